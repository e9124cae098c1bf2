// The CPU kernels, compiled once for each capability: the including file defines MASK2FORMER_CAPABILITY (a namespace),
// MASK2FORMER_VECTOR_BYTES and the compiler's target. Nothing in here may be shared between capabilities, hence the
// namespace and no headers with inline functions.
//
// Letters are those of kernel.h; N = L * P samples of a head. T is what is computed in: float64 where the value is,
// else float32. Positions and weights of samples are found for a vector of samples at a time, from arrays that hold one
// number a sample; sums over the corners go over a vector of channels at a time.

namespace mask2former {
namespace cpu {
namespace MASK2FORMER_CAPABILITY {
namespace {

#include "numbers.inc.h"
#include "arena.inc.h"
#include "convolution.inc.h"
#include "mask_strip.inc.h"
#include "masked_attention.inc.h"
#include "points.inc.h"
#include "position_wise.inc.h"

#if MASK2FORMER_VECTOR_BYTES == 64
#include "products.inc.h"
#else
constexpr ProductKernels PRODUCT_KERNELS{};
#endif

// The gradient of value finds corners of at least as many samples at a time.
constexpr int64_t FEWEST_SAMPLES = 384;

// How many queries ahead the gradient of value asks for what it reads: a head's share of one query lies too far from
// that of the next for the CPU to guess.
constexpr int64_t QUERIES_AHEAD = 16;

// A whole number of vectors.
int64_t padded(int64_t samples) {
  constexpr int64_t WIDTH = width_of<float>();
  return (samples + WIDTH - 1) / WIDTH * WIDTH;
}

int64_t samples_of_head(const Problem& problem) { return problem.levels * problem.points; }

// Arrays of one thread, for `capacity` samples (padded). What lies behind the last sample belongs to no sample, but is
// computed with.
template <typename T>
struct Samples {
  // What is the same for all queries: the size of a sample's level, the level's first position, the bytes from one row
  // of the level to the next, and those from the first head to the sample's.
  T* width;
  T* height;
  Integer<T>* columns;
  Integer<T>* start;
  uint64_t* row_bytes;
  uint64_t* head_bytes;
  // What a coordinate in cells is made of: numbers * scale + base, (x, y) of the samples of one head.
  T* scale;
  T* base;
  T* coordinates;  // in cells, (x, y) of a sample side by side
  T* x;
  T* y;
  T* weight;  // of attention
  T* fraction_x;
  T* fraction_y;
  T* dot;  // (capacity, 4) of grad_output with the corners' values
  int64_t* found;
  Integer<T>* any_corner;  // -1 where a sample has a corner to go to, else 0
  // Corners: top left, top right, bottom left, bottom right. See `corner_index` for the order in memory.
  T* corner_weight;   // attention weight times bilinear weight
  uint64_t* address;  // one head longer: there is always a next head to ask for
  T* no_row;  // (D) zeros to read where a corner doesn't exist, or a place for its gradient
};

// Where the first corner of a sample is; the others follow at distances of a vector.
template <typename T>
MASK2FORMER_INLINE int64_t corner_index(int64_t sample) {
  constexpr int64_t WIDTH = width_of<T>();
  return sample + 3 * (sample & ~(WIDTH - 1));
}

int64_t capacity_of(const Problem& problem) {
  const int64_t samples = problem.heads * samples_of_head(problem);
  return padded(samples > FEWEST_SAMPLES ? samples : FEWEST_SAMPLES);
}

template <typename T>
Samples<T> make_samples(const Problem& problem, Arena& arena) {
  const int64_t capacity = capacity_of(problem), pairs = 2 * samples_of_head(problem);
  Samples<T> samples;
  samples.width = arena.take<T>(capacity);
  samples.height = arena.take<T>(capacity);
  samples.columns = arena.take<Integer<T>>(capacity);
  samples.start = arena.take<Integer<T>>(capacity);
  samples.row_bytes = arena.take<uint64_t>(capacity);
  samples.head_bytes = arena.take<uint64_t>(capacity);
  samples.scale = arena.take<T>(pairs);
  samples.base = arena.take<T>(pairs);
  samples.coordinates = arena.take<T>(2 * capacity);
  samples.x = arena.take<T>(capacity);
  samples.y = arena.take<T>(capacity);
  samples.weight = arena.take<T>(capacity);
  samples.fraction_x = arena.take<T>(capacity);
  samples.fraction_y = arena.take<T>(capacity);
  samples.dot = arena.take<T>(4 * capacity);
  samples.found = arena.take<int64_t>(capacity);
  samples.any_corner = arena.take<Integer<T>>(capacity);
  samples.corner_weight = arena.take<T>(4 * capacity);
  samples.address = arena.take<uint64_t>(4 * padded(capacity + samples_of_head(problem)));
  samples.no_row = arena.take<T>(problem.channels);
  return samples;
}

template <typename T>
Samples<T> make_samples(const Problem& problem, void* workspace) {
  Arena arena{reinterpret_cast<uint64_t>(workspace)};
  return make_samples<T>(problem, arena);
}

size_t workspace_size(const Problem& problem) {
  Arena arena{0};
  make_samples<double>(problem, arena);  // no type takes more
  return size_t(arena.next);
}

// Fills in what is the same for all queries: for the levels [first, last) of `repeats` heads or queries. A cell is
// `cell_bytes` from the next, a head (or query) `head_bytes`.
template <typename T>
void describe_levels(const Problem& problem, int64_t first, int64_t last, int64_t repeats, int64_t cell_bytes,
                     int64_t head_bytes, Samples<T>& samples) {
  int64_t sample = 0;
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    int64_t position = 0;
    for (int64_t level = 0; level < last; ++level) {
      const int64_t rows = problem.spatial_shapes[2 * level], columns = problem.spatial_shapes[2 * level + 1];
      for (int64_t point = 0; level >= first && point < problem.points; ++point, ++sample) {
        samples.width[sample] = T(columns);
        samples.height[sample] = T(rows);
        samples.columns[sample] = Integer<T>(columns);
        samples.start[sample] = Integer<T>(position);
        samples.row_bytes[sample] = uint64_t(columns * cell_bytes);
        samples.head_bytes[sample] = uint64_t(repeat * head_bytes);
      }
      position += rows * columns;
    }
  }
  for (; sample % width_of<float>(); ++sample) {  // no sample, but computed with
    samples.width[sample] = samples.height[sample] = T(0);
    samples.columns[sample] = samples.start[sample] = 0;
    samples.row_bytes[sample] = samples.head_bytes[sample] = 0;
  }
}

// For `find_coordinates`: a location (x, y) is in cells x * width - 0.5, where 0 is the centre of the first cell; of an
// offset, the base depends on the query.
template <typename T>
void describe_coordinates(const Problem& problem, Samples<T>& samples) {
  for (int64_t n = 0; n < samples_of_head(problem); ++n) {
    const int64_t level = n / problem.points;
    samples.scale[2 * n] = problem.reference_points ? T(1) : T(problem.spatial_shapes[2 * level + 1]);
    samples.scale[2 * n + 1] = problem.reference_points ? T(1) : T(problem.spatial_shapes[2 * level]);
    samples.base[2 * n] = samples.base[2 * n + 1] = T(-0.5);
  }
}

// Coordinates in cells of a query's samples, (M, N, 2).
template <typename T>
void find_coordinates(const Problem& problem, int64_t b, int64_t q, const Samples<T>& samples, T* coordinates) {
  const int64_t numbers = 2 * samples_of_head(problem);
  T* __restrict base = samples.base;
  if (problem.reference_points) {
    const T* reference = static_cast<const T*>(problem.reference_points) + b * problem.reference_stride[0] +
                         q * problem.reference_stride[1];
    for (int64_t level = 0; level < problem.levels; ++level) {
      const T x = reference[2 * level] * T(problem.spatial_shapes[2 * level + 1]) - T(0.5);
      const T y = reference[2 * level + 1] * T(problem.spatial_shapes[2 * level]) - T(0.5);
      for (int64_t point = 0; point < problem.points; ++point, base += 2) base[0] = x, base[1] = y;
    }
    base = samples.base;
  }
  const T* scale = samples.scale;
  const T* from = static_cast<const T*>(problem.sampling) + b * problem.sampling_stride[0] +
                  q * problem.sampling_stride[1];
  for (int64_t m = 0; m < problem.heads; ++m, from += problem.sampling_stride[2], coordinates += numbers) {
    int64_t i = 0;
    for (; i + 4 <= numbers; i += 4)
      store(coordinates + i, load<Quad<T>>(from + i) * load<Quad<T>>(scale + i) + load<Quad<T>>(base + i));
    for (; i < numbers; ++i) coordinates[i] = from[i] * scale[i] + base[i];
  }
}

template <typename T>
MASK2FORMER_INLINE T largest_of(const T* numbers, int64_t count) {
  T largest = numbers[0];
  int64_t n = 0;
  if (count >= 4) {
    Quad<T> quad = load<Quad<T>>(numbers);
    for (n = 4; n + 4 <= count; n += 4) {
      const Quad<T> next = load<Quad<T>>(numbers + n);
      quad = next > quad ? next : quad;
    }
    Quad<T> other = MASK2FORMER_SHUFFLE(T, quad, quad, 2, 3, 0, 1);
    quad = other > quad ? other : quad;
    largest = quad[0] > quad[1] ? quad[0] : quad[1];
  }
  for (; n < count; ++n) largest = numbers[n] > largest ? numbers[n] : largest;
  return largest;
}

template <typename T>
MASK2FORMER_INLINE T sum_of_quad(const Quad<T>& quad) {
  return (quad[0] + quad[2]) + (quad[1] + quad[3]);
}

// Attention weights of a query's samples, (M, N): as given, or the softmax of logits.
template <typename T>
void find_weights(const Problem& problem, int64_t b, int64_t q, T* weight) {
  const int64_t count = samples_of_head(problem), all = problem.heads * count;
  if (all == 0) return;
  const T* from = static_cast<const T*>(problem.attention) + b * problem.attention_stride[0] +
                  q * problem.attention_stride[1];
  for (int64_t m = 0; m < problem.heads; ++m, from += problem.attention_stride[2]) {
    const T largest = problem.reference_points ? largest_of(from, count) : T(0);
    T* to = weight + m * count;
    int64_t n = 0;
    for (; n + 4 <= count; n += 4) store(to + n, load<Quad<T>>(from + n) - largest);
    for (; n < count; ++n) to[n] = from[n] - largest;
  }
  if (!problem.reference_points) return;
  exp_of_negative(weight, all);
  for (int64_t m = 0; m < problem.heads; ++m, weight += count) {
    Quad<T> sums{};
    int64_t n = 0;
    for (; n + 4 <= count; n += 4) sums += load<Quad<T>>(weight + n);
    T sum = sum_of_quad<T>(sums);
    for (; n < count; ++n) sum += weight[n];
    const T scale = T(1) / sum;
    for (n = 0; n + 4 <= count; n += 4) store(weight + n, load<Quad<T>>(weight + n) * scale);
    for (; n < count; ++n) weight[n] *= scale;
  }
}

// (x, y) side by side into two arrays.
template <typename T>
MASK2FORMER_INLINE void split_pairs(const T* pairs, int64_t count, T* x, T* y) {
  int64_t n = 0;
  for (; n + 4 <= count; n += 4) {
    const Quad<T> first = load<Quad<T>>(pairs + 2 * n), second = load<Quad<T>>(pairs + 2 * n + 4);
    store(x + n, MASK2FORMER_SHUFFLE(T, first, second, 0, 2, 4, 6));
    store(y + n, MASK2FORMER_SHUFFLE(T, first, second, 1, 3, 5, 7));
  }
  for (; n < count; ++n) x[n] = pairs[2 * n], y[n] = pairs[2 * n + 1];
}

// Where samples lie along one axis: see AxisPosition of ms_deform_attn.h, of which this is the version for vectors.
template <typename T>
struct Axis {
  Vector<T> fraction;
  Integers<T> low;
  Integers<T> low_inside;
  Integers<T> high_inside;
};

template <typename T>
MASK2FORMER_INLINE Axis<T> axis_of(Vector<T> coordinate, Vector<T> size) {
  const Vector<T> lowest = Vector<T>{} - T(2);
  Vector<T> clamped = coordinate < lowest ? lowest : coordinate;
  clamped = clamped > size ? size : clamped;
  Axis<T> axis;
  const Integers<T> truncated = __builtin_convertvector(clamped == clamped ? clamped : lowest, Integers<T>);
  axis.low = truncated + (__builtin_convertvector(truncated, Vector<T>) > clamped);  // true is -1
  axis.fraction = clamped - __builtin_convertvector(axis.low, Vector<T>);
  axis.low_inside = (clamped >= T(0)) & (clamped < size);
  axis.high_inside = (clamped >= T(-1)) & (clamped < size - T(1));
  return axis;
}

// Corners' rows that may be used: positions [first, last) at `memory`, a row every `stride` bytes.
struct Rows {
  uint64_t memory;
  int64_t stride;
  int64_t first, last;
};

// From x, y and weight to corner_weight, address and fractions of the first `count` samples. Where rows are a STRIP,
// corners outside of it don't count, and any_corner is found too.
template <bool STRIP, typename T>
void find_corners(const Samples<T>& samples, const Rows& rows, int64_t count) {
  constexpr int WIDTH = width_of<T>(), PARTS = ADDRESS_PARTS<T>;
  // Addresses count from `no_row`, so that a mask makes them zero for corners that aren't there.
  const uint64_t no_row = reinterpret_cast<uint64_t>(samples.no_row);
  const uint64_t origin = rows.memory - uint64_t(rows.first * rows.stride) - no_row;
  const uint64_t stride = uint64_t(rows.stride);
  const Integer<T> first = Integer<T>(rows.first), last = Integer<T>(rows.last);
  for (int64_t n = 0; n < count; n += WIDTH) {
    const Axis<T> column = axis_of<T>(load<Vector<T>>(samples.x + n), load<Vector<T>>(samples.width + n));
    const Axis<T> row = axis_of<T>(load<Vector<T>>(samples.y + n), load<Vector<T>>(samples.height + n));
    store(samples.fraction_x + n, column.fraction);
    store(samples.fraction_y + n, row.fraction);

    const Vector<T> weight = load<Vector<T>>(samples.weight + n);
    const Vector<T> right = weight * column.fraction, left = weight - right;
    const Vector<T> top = T(1) - row.fraction;
    T* corner_weight = samples.corner_weight + 4 * n;
    store(corner_weight, left * top);
    store(corner_weight + WIDTH, right * top);
    store(corner_weight + 2 * WIDTH, left * row.fraction);
    store(corner_weight + 3 * WIDTH, right * row.fraction);

    const Integers<T> columns = load<Integers<T>>(samples.columns + n);
    const Integers<T> top_left = load<Integers<T>>(samples.start + n) + row.low * columns + column.low;
    const Integers<T> position[4] = {top_left, top_left + 1, top_left + columns, top_left + columns + 1};
    const Integers<T> inside[4] = {row.low_inside & column.low_inside, row.low_inside & column.high_inside,
                                   row.high_inside & column.low_inside, row.high_inside & column.high_inside};
    Addresses base[PARTS], next_row[PARTS];
    widen(top_left, base);
    for (int part = 0; part < PARTS; ++part) {
      const int64_t from = n + part * (WIDTH / PARTS);
      base[part] = base[part] * stride + (load<Addresses>(samples.head_bytes + from) + origin);
      next_row[part] = load<Addresses>(samples.row_bytes + from);
    }
    Integers<T> any{};
    uint64_t* address = samples.address + 4 * n;
    for (int corner = 0; corner < 4; ++corner) {
      Integers<T> usable = inside[corner];
      if constexpr (STRIP) usable &= (position[corner] >= first) & (position[corner] < last);
      any |= usable;
      Addresses mask[PARTS];
      widen(usable, mask);
      for (int part = 0; part < PARTS; ++part) {
        Addresses here = base[part];
        if (corner & 1) here += stride;
        if (corner & 2) here += next_row[part];
        store(address + corner * WIDTH + part * (WIDTH / PARTS), (here & mask[part]) + no_row);
      }
    }
    if constexpr (STRIP) store(samples.any_corner + n, any);
  }
}

template <typename V>
Rows rows_of_value(const Problem& problem, int64_t b) {
  const V* value = static_cast<const V*>(problem.value) + b * problem.value_stride[0];
  return Rows{reinterpret_cast<uint64_t>(value), problem.value_stride[1] * int64_t(sizeof(V)), 0, problem.positions};
}

template <typename V>
MASK2FORMER_INLINE const V* corner_row(uint64_t address) {
  return reinterpret_cast<const V*>(address);
}

// Asks for memory that will be read soon, or never: any address will do.
MASK2FORMER_INLINE void prefetch(const void* address, int64_t bytes) {
  constexpr int64_t LINE = 64;
  for (int64_t byte = 0; byte < bytes; byte += LINE) __builtin_prefetch(static_cast<const char*>(address) + byte);
}
template <typename V, int VECTORS>
MASK2FORMER_INLINE void prefetch_channels(const V* row) {
  prefetch(row, VECTORS * width_of<typename Sum<V>::type>() * int64_t(sizeof(V)));
}

// One head's output: the weighted sum of corners. Left and right corners have sums of their own, because one sum would
// wait for its own additions. What the next head reads is on its way meanwhile (behind the last head's samples
// is nothing that matters).
template <typename V, int VECTORS>
MASK2FORMER_INLINE void sum_corners(const Samples<typename Sum<V>::type>& samples, int64_t first, int64_t last,
                                    int64_t channel, V* output) {
  using T = typename Sum<V>::type;
  constexpr int PARTS = Channels<V, VECTORS>::PARTS, WIDTH = width_of<T>();
  Channels<V, VECTORS> left, right;
  for (int i = 0; i < PARTS; ++i) left.part[i] = right.part[i] = typename Channels<V, VECTORS>::Part{};
  for (int64_t n = first; n < last; ++n) {
    const uint64_t* address = samples.address + corner_index<T>(n);
    const uint64_t* next_address = samples.address + corner_index<T>(n + last - first);
    const T* weight = samples.corner_weight + corner_index<T>(n);
#pragma GCC unroll 2
    for (int row = 0; row < 4 * WIDTH; row += 2 * WIDTH) {
      const auto left_value = load_channels<V, VECTORS>(corner_row<V>(address[row]) + channel);
      const auto right_value = load_channels<V, VECTORS>(corner_row<V>(address[row + WIDTH]) + channel);
      const T left_weight = weight[row], right_weight = weight[row + WIDTH];
#pragma GCC unroll 4
      for (int i = 0; i < PARTS; ++i) left.part[i] += left_weight * left_value.part[i];
#pragma GCC unroll 4
      for (int i = 0; i < PARTS; ++i) right.part[i] += right_weight * right_value.part[i];
      prefetch_channels<V, VECTORS>(corner_row<V>(next_address[row]) + channel);
      prefetch_channels<V, VECTORS>(corner_row<V>(next_address[row + WIDTH]) + channel);
    }
  }
  for (int i = 0; i < PARTS; ++i) left.part[i] += right.part[i];
  store_channels<V, VECTORS>(left, output + channel);
}

// Finds the corners of a query's samples from their coordinates in cells, in picture `b`.
template <typename V>
void find_corners_of_query(const Problem& problem, const Samples<typename Sum<V>::type>& samples, int64_t b,
                           const typename Sum<V>::type* coordinates) {
  const int64_t count = problem.heads * samples_of_head(problem);
  split_pairs(coordinates, count, samples.x, samples.y);
  find_corners<false>(samples, rows_of_value<V>(problem, b), count);
}

template <typename V>
Samples<typename Sum<V>::type> samples_of_value(const Problem& problem, void* workspace) {
  using T = typename Sum<V>::type;
  Samples<T> samples = make_samples<T>(problem, workspace);
  describe_coordinates(problem, samples);
  describe_levels(problem, 0, problem.levels, problem.heads, problem.value_stride[1] * int64_t(sizeof(V)),
                  problem.value_stride[2] * int64_t(sizeof(V)), samples);
  for (int64_t d = 0; d < problem.channels; ++d) samples.no_row[d] = T(0);
  return samples;
}

template <typename V>
void forward_of(const Problem& problem, void* output, int64_t first, int64_t last, void* workspace) {
  using T = typename Sum<V>::type;
  const Samples<T> samples = samples_of_value<V>(problem, workspace);
  const int64_t count = samples_of_head(problem);
  V* head = static_cast<V*>(output) + first * problem.heads * problem.channels;
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / problem.queries, q = row % problem.queries;
    find_coordinates(problem, b, q, samples, samples.coordinates);
    find_weights(problem, b, q, samples.weight);
    find_corners_of_query<V>(problem, samples, b, samples.coordinates);
    for (int64_t m = 0; m < problem.heads; ++m, head += problem.channels) {
      for_channels<V>(problem.channels, [&](auto vectors, int64_t channel) {
        sum_corners<V, decltype(vectors)::COUNT>(samples, m * count, (m + 1) * count, channel, head);
      });
    }
  }
}

// Coordinates in cells and attention weights of rows [first, last) of (B*Q), where their gradients will be.
template <typename T>
void place_samples_of(const Problem& problem, const Gradients& gradients, int64_t first, int64_t last,
                      void* workspace) {
  const int64_t count = problem.heads * samples_of_head(problem);
  Samples<T> samples = make_samples<T>(problem, workspace);
  describe_coordinates(problem, samples);
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / problem.queries, q = row % problem.queries;
    find_coordinates(problem, b, q, samples, static_cast<T*>(gradients.sampling) + row * count * 2);
    find_weights(problem, b, q, static_cast<T*>(gradients.attention) + row * count);
  }
}

// For samples [first, last) of one head: the products of grad_output with each corner's value, added to `dot`.
template <typename V, int VECTORS>
MASK2FORMER_INLINE void multiply_corners(const Samples<typename Sum<V>::type>& samples, int64_t first, int64_t last,
                                         int64_t channel, const V* grad_output) {
  using T = typename Sum<V>::type;
  using Part = typename Channels<V, VECTORS>::Part;
  const auto grad = load_channels<V, VECTORS>(grad_output + channel);
  for (int64_t n = first; n < last; ++n) {
    const uint64_t* address = samples.address + corner_index<T>(n);
    const uint64_t* next_address = samples.address + corner_index<T>(n + last - first);
    Part dot[4];
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const auto value = load_channels<V, VECTORS>(corner_row<V>(address[corner * width_of<T>()]) + channel);
      prefetch_channels<V, VECTORS>(corner_row<V>(next_address[corner * width_of<T>()]) + channel);
      dot[corner] = grad.part[0] * value.part[0];
#pragma GCC unroll 4
      for (int i = 1; i < Channels<V, VECTORS>::PARTS; ++i) dot[corner] += grad.part[i] * value.part[i];
    }
    Quad<T> sums = four_sums<T>(dot);
    if (channel > 0) sums += load<Quad<T>>(samples.dot + 4 * n);
    store(samples.dot + 4 * n, sums);
  }
}

// From the dots and fractions of a query's samples to their gradients, in place of coordinates and weights.
template <typename T>
void finish_gradients(const Problem& problem, const Samples<T>& samples, T* __restrict sampling,
                      T* __restrict attention) {
  const int64_t count = samples_of_head(problem), all = problem.heads * count;
  const T* __restrict dots = samples.dot;
  const T* __restrict fraction_x = samples.fraction_x;
  const T* __restrict fraction_y = samples.fraction_y;
  T* __restrict grad_weight = samples.x;  // which nobody needs any more
  for (int64_t n = 0; n < all; ++n) {
    const T* dot = dots + 4 * n;
    const T slope_top = dot[1] - dot[0], slope_bottom = dot[3] - dot[2];
    const T top = dot[0] + fraction_x[n] * slope_top, bottom = dot[2] + fraction_x[n] * slope_bottom;
    const T slope_x = slope_top + fraction_y[n] * (slope_bottom - slope_top), slope_y = bottom - top;
    sampling[2 * n] = attention[n] * slope_x;
    sampling[2 * n + 1] = attention[n] * slope_y;
    grad_weight[n] = top + fraction_y[n] * slope_y;
  }
  if (problem.reference_points) {
    for (int64_t m = 0; m < problem.heads; ++m, attention += count, grad_weight += count) {
      T mean = T(0);
      for (int64_t n = 0; n < count; ++n) mean += attention[n] * grad_weight[n];
      for (int64_t n = 0; n < count; ++n) attention[n] *= grad_weight[n] - mean;
    }
  } else {
    for (int64_t n = 0; n < all; ++n) {
      sampling[2 * n] *= samples.width[n];
      sampling[2 * n + 1] *= samples.height[n];
      attention[n] = grad_weight[n];
    }
  }
}

template <typename V>
void sampling_backward_of(const Problem& problem, const Gradients& gradients, int64_t first, int64_t last,
                          void* workspace) {
  using T = typename Sum<V>::type;
  const Samples<T> samples = samples_of_value<V>(problem, workspace);
  const int64_t count = samples_of_head(problem), all = problem.heads * count;
  const V* head = static_cast<const V*>(gradients.output) + first * problem.heads * problem.channels;
  for (int64_t row = first; row < last; ++row) {
    T* sampling = static_cast<T*>(gradients.sampling) + row * all * 2;
    T* attention = static_cast<T*>(gradients.attention) + row * all;
    find_corners_of_query<V>(problem, samples, row / problem.queries, sampling);
    for (int64_t m = 0; m < problem.heads; ++m, head += problem.channels) {
      for_channels<V>(problem.channels, [&](auto vectors, int64_t channel) {
        multiply_corners<V, decltype(vectors)::COUNT>(samples, m * count, (m + 1) * count, channel, head);
      });
    }
    finish_gradients(problem, samples, sampling, attention);
  }
}

// Adds grad_output's share to each corner's sums, of the samples in `found`.
template <typename V, int VECTORS>
MASK2FORMER_INLINE void spread_to_corners(const Samples<typename Sum<V>::type>& samples, int64_t found,
                                          int64_t channel, const V* grad_output) {
  using T = typename Sum<V>::type;
  using Part = typename Channels<V, VECTORS>::Part;
  const auto grad = load_channels<V, VECTORS>(grad_output + channel);
  for (int64_t i = 0; i < found; ++i) {
    const uint64_t* address = samples.address + corner_index<T>(samples.found[i]);
    const T* weight = samples.corner_weight + corner_index<T>(samples.found[i]);
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const T weight_here = weight[corner * width_of<T>()];
      T* sums = reinterpret_cast<T*>(address[corner * width_of<T>()]) + channel;
#pragma GCC unroll 4
      for (int i = 0; i < Channels<V, VECTORS>::PARTS; ++i) {
        T* part = sums + i * int64_t(sizeof(Part) / sizeof(T));
        store(part, load<Part>(part) + weight_here * grad.part[i]);
      }
    }
  }
}

// The levels that have cells in positions [first, last): from `begin` up to before `end`.
struct Levels {
  int64_t begin, end;
};

Levels levels_at(const Problem& problem, int64_t first, int64_t last) {
  Levels levels{problem.levels, 0};
  for (int64_t level = 0, position = 0; level < problem.levels; ++level) {
    const int64_t next = position + problem.spatial_shapes[2 * level] * problem.spatial_shapes[2 * level + 1];
    if (position < last && next > first) {
      if (levels.begin > level) levels.begin = level;
      levels.end = level + 1;
    }
    position = next;
  }
  return levels;
}

// Copies coordinates and weights of one head's samples at `levels`, for queries in a row, out of where their gradients
// will be.
template <typename T>
void take_samples(const Problem& problem, const Gradients& gradients, int64_t first_row, int64_t queries,
                  const Levels& levels, const Samples<T>& samples) {
  const int64_t count = samples_of_head(problem), here = (levels.end - levels.begin) * problem.points;
  const int64_t step = problem.heads * count;
  const int64_t first = first_row * count + levels.begin * problem.points;
  for (int64_t k = 0; k < queries; ++k) {
    const T* coordinates = static_cast<const T*>(gradients.sampling) + 2 * (first + k * step);
    const T* weight = static_cast<const T*>(gradients.attention) + first + k * step;
    prefetch(coordinates + 2 * QUERIES_AHEAD * step, 2 * here * int64_t(sizeof(T)));
    prefetch(weight + QUERIES_AHEAD * step, here * int64_t(sizeof(T)));
    split_pairs(coordinates, here, samples.x + k * here, samples.y + k * here);
    for (int64_t n = 0; n < here; ++n) samples.weight[k * here + n] = weight[n];
  }
}

// Lists those of samples [first, last) that have a corner to go to.
template <typename T>
MASK2FORMER_INLINE int64_t list_found(const Samples<T>& samples, int64_t first, int64_t last) {
  int64_t found = 0;
  for (int64_t n = first; n < last; ++n) {  // a branch would be guessed wrong too often
    samples.found[found] = n;
    found -= int64_t(samples.any_corner[n]);
  }
  return found;
}

template <typename V>
void sum_up_strip(const Problem& problem, const Gradients& gradients, const Strip& strip, const Levels& levels,
                  void* workspace) {
  using T = typename Sum<V>::type;
  const int64_t channels = problem.channels, here = (levels.end - levels.begin) * problem.points;
  const int64_t cell_bytes = channels * int64_t(sizeof(T)), block = capacity_of(problem) / here;
  Samples<T> samples = make_samples<T>(problem, workspace);
  describe_levels(problem, levels.begin, levels.end, block, cell_bytes, 0, samples);
  const Rows rows{reinterpret_cast<uint64_t>(strip.sums), cell_bytes, strip.first, strip.last};
  for (int64_t begin = 0; begin < problem.queries; begin += block) {
    const int64_t queries = problem.queries - begin < block ? problem.queries - begin : block;
    const int64_t first_row = (strip.batch * problem.queries + begin) * problem.heads + strip.head;
    take_samples(problem, gradients, first_row, queries, levels, samples);
    find_corners<true>(samples, rows, queries * here);
    for (int64_t k = 0; k < queries; ++k) {
      const int64_t found = list_found(samples, k * here, (k + 1) * here);
      const V* grad = static_cast<const V*>(gradients.output) + (first_row + k * problem.heads) * channels;
      prefetch(grad + QUERIES_AHEAD * problem.heads * channels, channels * int64_t(sizeof(V)));
      for_channels<V>(channels, [&](auto vectors, int64_t channel) {
        spread_to_corners<V, decltype(vectors)::COUNT>(samples, found, channel, grad);
      });
    }
  }
}

template <typename V>
void value_backward_of(const Problem& problem, const Gradients& gradients, const Strip& strip, void* workspace) {
  using T = typename Sum<V>::type;
  const int64_t channels = problem.channels;
  T* sums = static_cast<T*>(strip.sums);
  __builtin_memset(sums, 0, size_t((strip.last - strip.first) * channels) * sizeof(T));
  const Levels levels = levels_at(problem, strip.first, strip.last);
  if (levels.begin < levels.end && problem.points > 0) sum_up_strip<V>(problem, gradients, strip, levels, workspace);
  V* to = static_cast<V*>(gradients.value) + (strip.batch * problem.positions * problem.heads + strip.head) * channels;
  for (int64_t position = strip.first; position < strip.last; ++position) {
    for_channels<V>(channels, [&](auto vectors, int64_t channel) {
      constexpr int COUNT = decltype(vectors)::COUNT;
      store_channels<V, COUNT>(load_sums<V, COUNT>(sums + (position - strip.first) * channels + channel),
                               to + position * problem.heads * channels + channel);
    });
  }
}

// Calls FUNCTION<V> for the type of `problem`.
#define MASK2FORMER_FOR_TYPE(FUNCTION, ...)   \
  switch (problem.value_type) {               \
    case Type::float64:                       \
      return FUNCTION<double>(__VA_ARGS__);   \
    case Type::float32:                       \
      return FUNCTION<float>(__VA_ARGS__);    \
    case Type::bfloat16:                      \
      return FUNCTION<bfloat16>(__VA_ARGS__); \
    case Type::float16:                       \
      return FUNCTION<float16>(__VA_ARGS__);  \
  }

void forward(const Problem& problem, void* output, int64_t first, int64_t last, void* workspace) {
  MASK2FORMER_FOR_TYPE(forward_of, problem, output, first, last, workspace)
}

void place_samples(const Problem& problem, const Gradients& gradients, int64_t first, int64_t last, void* workspace) {
  if (problem.value_type == Type::float64)
    place_samples_of<double>(problem, gradients, first, last, workspace);
  else
    place_samples_of<float>(problem, gradients, first, last, workspace);
}

void value_backward(const Problem& problem, const Gradients& gradients, const Strip& strip, void* workspace) {
  MASK2FORMER_FOR_TYPE(value_backward_of, problem, gradients, strip, workspace)
}

void sampling_backward(const Problem& problem, const Gradients& gradients, int64_t first, int64_t last,
                       void* workspace) {
  MASK2FORMER_FOR_TYPE(sampling_backward_of, problem, gradients, first, last, workspace)
}

#undef MASK2FORMER_FOR_TYPE

constexpr Kernels KERNELS{workspace_size,    forward,           place_samples,       value_backward,
                          sampling_backward, ATTENTION_KERNELS, CONVOLUTION_KERNELS, MASK_KERNELS,
                          POINT_KERNELS,     POSITION_WISE_KERNELS, PRODUCT_KERNELS};

}  // namespace
}  // namespace MASK2FORMER_CAPABILITY
}  // namespace cpu
}  // namespace mask2former
