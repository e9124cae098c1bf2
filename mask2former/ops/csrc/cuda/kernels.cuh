// The CUDA kernels of multi-scale deformable attention, on plain pointers and without a header of torch.
//
// A group of `Lanes` threads of a warp computes one (picture, query, head); a thread has `Vec` neighbouring channels,
// 16 bytes of the value in the fast variants. Lane j works out where sample j of the next `Lanes` ones lies and what it
// weighs; then the group goes through them together, each lane being told by shuffles. Threads of a group never part
// ways around a shuffle, and groups without a query of their own (the last block's) go along without writing.
//
// tests/cuda_on_host compiles this file with the host's compiler and runs it a thread at a time.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../ms_deform_attn.h"

namespace mask2former {
namespace cuda {

// ---------------------------------------------------------------------------------------------------------------------
// Numbers. Half types are stored as their bits and computed with as float32. A kernel's T is the type of the value, the
// output and their gradients, and its A, which it computes with, the type of all else.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

#if defined(__CUDACC__)
__device__ __forceinline__ float float_of_half_bits(uint16_t bits) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
}
__device__ __forceinline__ uint16_t half_bits_of_float(float number) {
  uint16_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(number));
  return result;
}
#endif

__device__ __forceinline__ double widen(double number) { return number; }
__device__ __forceinline__ float widen(float number) { return number; }
__device__ __forceinline__ float widen(Float16 number) { return float_of_half_bits(number.bits); }
__device__ __forceinline__ float widen(BFloat16 number) {
  const uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

__device__ __forceinline__ void narrow(double number, double& result) { result = number; }
__device__ __forceinline__ void narrow(float number, float& result) { result = number; }
__device__ __forceinline__ void narrow(float number, Float16& result) { result.bits = half_bits_of_float(number); }
__device__ __forceinline__ void narrow(float number, BFloat16& result) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &number, sizeof(bits));
  result.bits = number != number ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// Reads `Vec` neighbours, with one 128-bit load where they are 16 bytes (and then aligned to them).
template <int Vec, typename T, typename A>
__device__ __forceinline__ void load(const T* source, A (&result)[Vec]) {
  T numbers[Vec];
  if constexpr (sizeof(numbers) == sizeof(uint4)) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(source));
    memcpy(numbers, &bits, sizeof(bits));
  } else {
    for (int i = 0; i < Vec; ++i) numbers[i] = source[i];
  }
#pragma unroll
  for (int i = 0; i < Vec; ++i) result[i] = widen(numbers[i]);
}

template <int Vec, typename T, typename A>
__device__ __forceinline__ void store(T* target, const A (&source)[Vec]) {
  T numbers[Vec];
#pragma unroll
  for (int i = 0; i < Vec; ++i) narrow(source[i], numbers[i]);
  if constexpr (sizeof(numbers) == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, numbers, sizeof(bits));
    *reinterpret_cast<uint4*>(target) = bits;
  } else {
    for (int i = 0; i < Vec; ++i) target[i] = numbers[i];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What a kernel works on

struct Level {
  int height, width, start;  // start: positions of the levels before it
};

constexpr int inline_levels = 8;
constexpr int threads_per_block = 256;
constexpr unsigned whole_warp = 0xffffffffu;

// Strides count elements. value's D, and the (L, P, 2) or (L, P) of the sampling tensors, are contiguous.
struct Problem {
  int64_t batch, queries, heads, channels;
  int levels, points;
  Level level[inline_levels];
  const Level* all_levels;     // on the device, where there are more than inline_levels; else null
  bool queries_are_positions;  // a query for each position of each level, in that order
  const void* value;             // (B, S, M, D)
  int64_t value_stride[3];       // of B, S, M
  const void* reference_points;  // (B, Q, L, 2), normalised; null: `sampling` holds locations, `attention` weights
  int64_t reference_stride[2];   // of B (0 where all pictures share them), Q
  const void* sampling;          // (B, Q, M, L, P, 2): offsets in cells, or normalised locations
  int64_t sampling_stride[3];    // of B, Q, M
  const void* attention;         // (B, Q, M, L, P): logits, or weights
  int64_t attention_stride[3];   // of B, Q, M
};

// Everything contiguous. One of `value` and `fixed` is null.
struct Gradients {
  const void* output;   // (B, Q, M, D), in value's type
  void* value;          // (B, S, M, D), zeros, in float32, or float64 for float64: added to
  int64_t* fixed;       // (B, S, M, D), zeros: the same as fixed-point numbers, which add up to the same in any order
  uint32_t* poison;     // (B, S, M, ceil(D / 32)), zeros: a bit is set where something not finite was to be added
  const double* bound;  // one number: no sum of `fixed` can be larger
  void* sampling;       // (B, Q, M, L, P, 2)
  void* attention;      // (B, Q, M, L, P)
};

__device__ __forceinline__ Level level_of(const Problem& problem, int index) {
  return problem.all_levels ? problem.all_levels[index] : problem.level[index];
}

// Which query comes `rank`-th. Where queries are the positions of maps, 8 rows are gone through column by column, so
// that the queries of a block are a tile of a map and read the same cells, out of the cache.
__device__ __forceinline__ int64_t query_of_rank(const Problem& problem, int64_t rank) {
  constexpr int64_t tile = 8;
  if (!problem.queries_are_positions) return rank;
  int index = 0;
  while (index + 1 < problem.levels && rank >= level_of(problem, index + 1).start) ++index;
  const Level level = level_of(problem, index);
  const int64_t within = rank - level.start;
  const int64_t band = within / (tile * level.width);
  const int64_t rest = within - band * tile * level.width;
  const int64_t rows = level.height - band * tile < tile ? level.height - band * tile : tile;
  return level.start + (band * tile + rest % rows) * level.width + rest / rows;
}

// The (picture, query, head) of a group. Groups past the last query take the last one, and aren't `active`.
struct Item {
  int64_t batch, query, head;
  bool active;
};

template <int Lanes>
__device__ __forceinline__ Item item_of_thread(const Problem& problem, int64_t block) {
  constexpr int items = threads_per_block / Lanes;
  const int64_t tiles = (problem.queries + items - 1) / items;
  const int64_t pair = block / tiles;
  const int64_t rank = (block - pair * tiles) * items + threadIdx.x / Lanes;
  Item item;
  item.active = rank < problem.queries;
  item.query = query_of_rank(problem, item.active ? rank : problem.queries - 1);
  item.batch = pair / problem.heads;
  item.head = pair - item.batch * problem.heads;
  return item;
}

// ---------------------------------------------------------------------------------------------------------------------
// One sample

// Corners by number: 0 top left, 1 top right, 2 bottom left, 3 bottom right.
template <typename A>
struct Sample {
  int position;           // of corner 0, which may lie outside
  int width_and_corners;  // width of the level << 4 | a bit for each corner that exists
  A x, y;                 // how far from corner 0 to corner 3
  A weight;               // not yet divided by their sum where a softmax is asked for

  __device__ __forceinline__ bool has(int corner) const { return width_and_corners >> corner & 1; }
  __device__ __forceinline__ int position_of(int corner) const {
    return position + (corner & 1) + (corner >> 1) * (width_and_corners >> 4);
  }
  __device__ __forceinline__ A share(int corner) const {
    return (corner & 1 ? x : A(1) - x) * (corner & 2 ? y : A(1) - y);
  }
};

// Pointers to one item's part of the sampling tensors.
template <typename A>
struct Samples {
  const A* reference;  // null: locations and weights are given as they are
  const A* sampling;
  const A* attention;
};

template <typename A>
__device__ __forceinline__ Samples<A> samples_of(const Problem& problem, const Item& item) {
  Samples<A> samples;
  samples.reference = static_cast<const A*>(problem.reference_points);
  if (samples.reference)
    samples.reference += item.batch * problem.reference_stride[0] + item.query * problem.reference_stride[1];
  samples.sampling = static_cast<const A*>(problem.sampling) + item.batch * problem.sampling_stride[0] +
                     item.query * problem.sampling_stride[1] + item.head * problem.sampling_stride[2];
  samples.attention = static_cast<const A*>(problem.attention) + item.batch * problem.attention_stride[0] +
                      item.query * problem.attention_stride[1] + item.head * problem.attention_stride[2];
  return samples;
}

template <typename A>
__device__ __forceinline__ Sample<A> sample_at(const Problem& problem, const Samples<A>& samples, int index,
                                               A largest) {
  const int level_index = index / problem.points;
  const Level level = level_of(problem, level_index);
  A x = samples.sampling[2 * index], y = samples.sampling[2 * index + 1];
  Sample<A> sample;
  sample.weight = samples.attention[index];
  if (samples.reference) {
    x = coordinate_of_offset(samples.reference[2 * level_index], x, level.width);
    y = coordinate_of_offset(samples.reference[2 * level_index + 1], y, level.height);
    sample.weight = exponential(sample.weight - largest);
  } else {
    x = coordinate_of_location(x, level.width);
    y = coordinate_of_location(y, level.height);
  }
  const AxisPosition<A> column = axis_position(x, level.width), row = axis_position(y, level.height);
  const int corners = (row.low_inside && column.low_inside) | (row.low_inside && column.high_inside) << 1 |
                      (row.high_inside && column.low_inside) << 2 | (row.high_inside && column.high_inside) << 3;
  sample.width_and_corners = level.width << 4 | corners;
  sample.position = corners ? level.start + row.low * level.width + column.low : 0;
  sample.x = corners ? column.fraction : A(0);  // NaN where there is no such place
  sample.y = corners ? row.fraction : A(0);
  return sample;
}

template <int Lanes, typename A>
__device__ __forceinline__ Sample<A> sample_of_lane(const Sample<A>& own, int lane) {
  Sample<A> sample;
  sample.position = __shfl_sync(whole_warp, own.position, lane, Lanes);
  sample.width_and_corners = __shfl_sync(whole_warp, own.width_and_corners, lane, Lanes);
  sample.x = __shfl_sync(whole_warp, own.x, lane, Lanes);
  sample.y = __shfl_sync(whole_warp, own.y, lane, Lanes);
  sample.weight = __shfl_sync(whole_warp, own.weight, lane, Lanes);
  return sample;
}

template <int Lanes, typename A>
__device__ __forceinline__ A sum_of_group(A number) {
#pragma unroll
  for (int distance = Lanes / 2; distance > 0; distance /= 2)
    number += __shfl_xor_sync(whole_warp, number, distance, Lanes);
  return number;
}

// Of all samples of the item.
template <int Lanes, typename A>
__device__ __forceinline__ A largest_logit(const Samples<A>& samples, int count, int lane) {
  A largest = A(-INFINITY);
  for (int index = lane; index < count; index += Lanes) {
    const A logit = samples.attention[index];
    largest = logit > largest ? logit : largest;
  }
#pragma unroll
  for (int distance = Lanes / 2; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(whole_warp, largest, distance, Lanes);
    largest = other > largest ? other : largest;
  }
  return largest;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward. Whole: Vec * Lanes channels are all there are; else there may be any number, and Vec is 1.

template <typename T, int Vec, int Lanes, bool Whole>
__global__ void __launch_bounds__(threads_per_block)
    forward_kernel(const Problem problem, const int64_t first_block, T* __restrict__ output) {
  using A = typename Accumulator<T>::type;
  const Item item = item_of_thread<Lanes>(problem, first_block + blockIdx.x);
  const int lane = threadIdx.x % Lanes;
  const int count = problem.levels * problem.points;
  const Samples<A> samples = samples_of<A>(problem, item);
  const T* const value = static_cast<const T*>(problem.value) + item.batch * problem.value_stride[0] +
                         item.head * problem.value_stride[2];
  const A largest = samples.reference ? largest_logit<Lanes>(samples, count, lane) : A(0);
  const int64_t row = (item.batch * problem.queries + item.query) * problem.heads + item.head;
  const int64_t channels = Whole ? Vec * Lanes : problem.channels;

  for (int64_t start = 0; start < channels; start += Vec * Lanes) {
    const int64_t channel = start + lane * Vec;
    const bool present = Whole || channel < channels;
    A sums[Vec] = {};
    A own_weights = 0;
    for (int first = 0; first < count; first += Lanes) {
      Sample<A> own = {};
      if (first + lane < count) own = sample_at(problem, samples, first + lane, largest);
      own_weights += own.weight;
      const int here = count - first < Lanes ? count - first : Lanes;
#pragma unroll 4
      for (int j = 0; j < here; ++j) {
        const Sample<A> sample = sample_of_lane<Lanes>(own, j);
        A sampled[Vec] = {};
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          if (!present || !sample.has(corner)) continue;
          A cell[Vec];
          load(value + sample.position_of(corner) * problem.value_stride[1] + channel, cell);
          const A share = sample.share(corner);
#pragma unroll
          for (int i = 0; i < Vec; ++i) sampled[i] += share * cell[i];
        }
#pragma unroll
        for (int i = 0; i < Vec; ++i) sums[i] += sample.weight * sampled[i];
      }
    }
    if (samples.reference) {
      const A total = sum_of_group<Lanes>(own_weights);
#pragma unroll
      for (int i = 0; i < Vec; ++i) sums[i] /= total;
    }
    if (item.active && present) store(output + row * channels + channel, sums);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

template <int Vec>
__device__ __forceinline__ void add(double* target, const double (&numbers)[Vec]) {
#pragma unroll
  for (int i = 0; i < Vec; ++i) atomicAdd(target + i, numbers[i]);
}

template <int Vec>
__device__ __forceinline__ void add(float* target, const float (&numbers)[Vec]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int together = Vec % 4 == 0 ? Vec : 0;
#pragma unroll
  for (int i = 0; i < together; i += 4)
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target + i)),
                 "f"(numbers[i]), "f"(numbers[i + 1]), "f"(numbers[i + 2]), "f"(numbers[i + 3])
                 : "memory");
#else
  constexpr int together = 0;
#endif
#pragma unroll
  for (int i = together; i < Vec; ++i) atomicAdd(target + i, numbers[i]);
}

// The power of two that fixed-point numbers are multiples of is 2^-fixed_point_digits(bound): sums up to `bound` stay
// below 2^62. With N contributions (Q * P at most) of at most m in a sum, the bound is N * m, and a contribution is
// rounded by at most N * m * 2^-62, which is 2^-45 of the largest one at 86,016 contributions: finer than float32 as
// long as contributions are not 2^21 times smaller than the largest; for float64, 13 digits of the largest.
__device__ __forceinline__ int fixed_point_digits(double bound) {
  if (!(bound > 0)) return 0;  // nothing finite but zeros is added
  int exponent = 1024;
  if (bound < double(INFINITY)) frexp(bound, &exponent);
  const int digits = 62 - exponent;
  return digits < 1000 ? digits : 1000;
}

template <typename A>
__device__ __forceinline__ void add_fixed(const Gradients& gradients, int64_t cell, int64_t channels, int64_t channel,
                                          double scale, A number) {
  const double scaled = double(number) * scale;
  if (fabs(scaled) < 9e18) {
    atomicAdd(reinterpret_cast<unsigned long long*>(gradients.fixed + cell * channels + channel),
              static_cast<unsigned long long>(llrint(scaled)));
  } else {
    atomicOr(gradients.poison + cell * ((channels + 31) / 32) + channel / 32, 1u << (channel % 32));
  }
}

template <typename T, int Vec, int Lanes, bool Whole>
__global__ void __launch_bounds__(threads_per_block)
    backward_kernel(const Problem problem, const int64_t first_block, const int64_t positions,
                    const Gradients gradients) {
  using A = typename Accumulator<T>::type;
  const Item item = item_of_thread<Lanes>(problem, first_block + blockIdx.x);
  const int lane = threadIdx.x % Lanes;
  const int count = problem.levels * problem.points;
  const Samples<A> samples = samples_of<A>(problem, item);
  const T* const value = static_cast<const T*>(problem.value) + item.batch * problem.value_stride[0] +
                         item.head * problem.value_stride[2];
  const int64_t row = (item.batch * problem.queries + item.query) * problem.heads + item.head;
  const int64_t channels = Whole ? Vec * Lanes : problem.channels;
  const T* const grad_output = static_cast<const T*>(gradients.output) + row * channels;
  A* const grad_sampling = static_cast<A*>(gradients.sampling) + row * count * 2;
  A* const grad_attention = static_cast<A*>(gradients.attention) + row * count;
  const double scale = gradients.fixed ? ldexp(1.0, fixed_point_digits(*gradients.bound)) : 0.0;

  A largest = 0, factor = 1;  // factor: 1 / sum of the softmax
  if (samples.reference) {
    largest = largest_logit<Lanes>(samples, count, lane);
    A total = 0;
    for (int index = lane; index < count; index += Lanes)
      total += exponential(samples.attention[index] - largest);
    factor = A(1) / sum_of_group<Lanes>(total);
  }
  A whole_grad[Vec];  // of all the thread's channels where they are so few
  if constexpr (Whole) load(grad_output + lane * Vec, whole_grad);

  A own_weighted = 0;  // sum of weight * gradient of the weight
  for (int first = 0; first < count; first += Lanes) {
    Sample<A> own = {};
    const bool present = first + lane < count;
    if (present) {
      own = sample_at(problem, samples, first + lane, largest);
      own.weight *= factor;
    }
    A own_grad_x = 0, own_grad_y = 0, own_grad_weight = 0;
    const int here = count - first < Lanes ? count - first : Lanes;
#pragma unroll 2
    for (int j = 0; j < here; ++j) {
      const Sample<A> sample = sample_of_lane<Lanes>(own, j);
      A dots[4] = {};  // of each corner's cell and the output's gradient
      for (int64_t channel = lane * Vec; channel < channels; channel += Vec * Lanes) {
        A grad[Vec];
        if constexpr (Whole) {
#pragma unroll
          for (int i = 0; i < Vec; ++i) grad[i] = whole_grad[i];
        } else {
          load(grad_output + channel, grad);
        }
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          if (!sample.has(corner)) continue;
          const int64_t position = sample.position_of(corner);
          A cell[Vec];
          load(value + position * problem.value_stride[1] + channel, cell);
#pragma unroll
          for (int i = 0; i < Vec; ++i) dots[corner] += cell[i] * grad[i];
          if (!item.active) continue;
          const A share = sample.weight * sample.share(corner);
          const int64_t target = (item.batch * positions + position) * problem.heads + item.head;
          A parts[Vec];
#pragma unroll
          for (int i = 0; i < Vec; ++i) parts[i] = share * grad[i];
          if (gradients.fixed) {
#pragma unroll
            for (int i = 0; i < Vec; ++i)
              add_fixed(gradients, target, channels, channel + i, scale, parts[i]);
          } else {
            add(static_cast<A*>(gradients.value) + target * channels + channel, parts);
          }
        }
      }
      const A x = sample.x, y = sample.y;
      const A grad_x =
          sum_of_group<Lanes>((A(1) - y) * (dots[1] - dots[0]) + y * (dots[3] - dots[2]));
      const A grad_y =
          sum_of_group<Lanes>((A(1) - x) * (dots[2] - dots[0]) + x * (dots[3] - dots[1]));
      const A grad_weight = sum_of_group<Lanes>((A(1) - y) * ((A(1) - x) * dots[0] + x * dots[1]) +
                                                y * ((A(1) - x) * dots[2] + x * dots[3]));
      if (j == lane) {
        own_grad_x = grad_x;
        own_grad_y = grad_y;
        own_grad_weight = grad_weight;
      }
    }
    if (present && item.active) {
      const int index = first + lane;
      own_grad_x *= own.weight;
      own_grad_y *= own.weight;
      if (!samples.reference) {
        const Level level = level_of(problem, index / problem.points);
        own_grad_x *= A(level.width);
        own_grad_y *= A(level.height);
      }
      own_weighted += own.weight * own_grad_weight;
      grad_attention[index] = own_grad_weight;  // before softmax's part
      grad_sampling[2 * index] = own_grad_x;
      grad_sampling[2 * index + 1] = own_grad_y;
    }
  }
  if (samples.reference) {
    const A weighted = sum_of_group<Lanes>(own_weighted);
    for (int index = lane; item.active && index < count; index += Lanes) {
      const A weight = exponential(samples.attention[index] - largest) * factor;
      grad_attention[index] = weight * (grad_attention[index] - weighted);
    }
  }
}

// Turns the fixed-point sums into numbers of the value's type.
template <typename T>
__global__ void __launch_bounds__(threads_per_block)
    finish_kernel(const Gradients gradients, const int64_t cells, const int64_t channels, T* __restrict__ grad_value) {
  using A = typename Accumulator<T>::type;
  const double unit = ldexp(1.0, -fixed_point_digits(*gradients.bound));
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads_per_block;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x; i < cells * channels;
       i += step) {
    const int64_t cell = i / channels, channel = i - cell * channels;
    const bool poisoned = gradients.poison[cell * ((channels + 31) / 32) + channel / 32] >> (channel % 32) & 1;
    narrow(poisoned ? A(NAN) : A(double(gradients.fixed[i]) * unit), grad_value[i]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Choice of the kernel. `launch(kernel, blocks, arguments...)` starts it.

constexpr int64_t most_blocks = 0x7fffffff;

template <int Lanes, typename Body>
void for_each_grid(const Problem& problem, const Body& body) {
  constexpr int64_t items = threads_per_block / Lanes;
  const int64_t blocks = problem.batch * problem.heads * ((problem.queries + items - 1) / items);
  for (int64_t first = 0; first < blocks; first += most_blocks)
    body(first, blocks - first < most_blocks ? blocks - first : most_blocks);
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T>
struct Kernels {
  static constexpr int vec = 16 / sizeof(T);
  static constexpr int general_lanes = 16;

  static bool can_be_fast(const Problem& problem) {
    for (int64_t stride : problem.value_stride)
      if (stride % vec != 0) return false;
    return aligned(problem.value);
  }

  template <int Vec, int Lanes, bool Whole, typename Launch>
  static void forward_with(const Launch& launch, const Problem& problem, void* output) {
    for_each_grid<Lanes>(problem, [&](int64_t first, int64_t blocks) {
      launch(forward_kernel<T, Vec, Lanes, Whole>, blocks, problem, first, static_cast<T*>(output));
    });
  }

  template <typename Launch>
  static void forward(const Launch& launch, const Problem& problem, void* output) {
    const bool fast = can_be_fast(problem) && aligned(output);
    if (fast && problem.channels == 16) return forward_with<vec, 16 / vec, true>(launch, problem, output);
    if (fast && problem.channels == 32) return forward_with<vec, 32 / vec, true>(launch, problem, output);
    if (fast && problem.channels == 64) return forward_with<vec, 64 / vec, true>(launch, problem, output);
    forward_with<1, general_lanes, false>(launch, problem, output);
  }

  template <int Vec, int Lanes, bool Whole, typename Launch>
  static void backward_with(const Launch& launch, const Problem& problem, int64_t positions,
                            const Gradients& gradients) {
    for_each_grid<Lanes>(problem, [&](int64_t first, int64_t blocks) {
      launch(backward_kernel<T, Vec, Lanes, Whole>, blocks, problem, first, positions, gradients);
    });
  }

  template <typename Launch>
  static void backward(const Launch& launch, const Problem& problem, int64_t positions, const Gradients& gradients) {
    const bool fast = can_be_fast(problem) && aligned(gradients.output) && aligned(gradients.value);
    if (fast && problem.channels == 16)
      return backward_with<vec, 16 / vec, true>(launch, problem, positions, gradients);
    if (fast && problem.channels == 32)
      return backward_with<vec, 32 / vec, true>(launch, problem, positions, gradients);
    if (fast && problem.channels == 64)
      return backward_with<vec, 64 / vec, true>(launch, problem, positions, gradients);
    backward_with<1, general_lanes, false>(launch, problem, positions, gradients);
  }

  // After a backward pass with `gradients.fixed`; `grad_value` is in value's type.
  template <typename Launch>
  static void finish(const Launch& launch, const Problem& problem, int64_t positions, const Gradients& gradients,
                     void* grad_value) {
    const int64_t cells = problem.batch * positions * problem.heads;
    const int64_t blocks = (cells * problem.channels + threads_per_block - 1) / threads_per_block;
    launch(finish_kernel<T>, blocks < 65535 ? blocks : 65535, gradients, cells, problem.channels,
           static_cast<T*>(grad_value));
  }
};

// Calls body(Kernels<T>()) for the type.
template <typename Body>
void with_type(Type value, const Body& body) {
  switch (value) {
    case Type::float64:
      return body(Kernels<double>());
    case Type::float32:
      return body(Kernels<float>());
    case Type::bfloat16:
      return body(Kernels<BFloat16>());
    case Type::float16:
      return body(Kernels<Float16>());
  }
}

}  // namespace cuda
}  // namespace mask2former
