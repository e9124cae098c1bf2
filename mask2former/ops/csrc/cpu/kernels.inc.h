// The CPU kernels, compiled once for each capability: the including file defines MASK2FORMER_CAPABILITY (a namespace),
// MASK2FORMER_VECTOR_BYTES and the compiler's target. Nothing in here may be shared between capabilities, hence the
// namespace and no headers with inline functions.
//
// Letters are those of kernel.h; N = L * P samples of a head.

namespace mask2former {
namespace cpu {
namespace MASK2FORMER_CAPABILITY {
namespace {

#include "numbers.inc.h"

// What is computed once for the samples of one (picture, query, head). Corners: top left, top right, bottom left,
// bottom right; one that doesn't exist points at a row of zeros, so that there is no branch and nothing of a cell that
// isn't meant (NaN times zero is NaN) spreads.
template <typename V>
struct Samples {
  using T = typename Sum<V>::type;
  int64_t count;         // N
  const int64_t* start;  // (N) first position of the sample's level
  const int* height;     // (N)
  const int* width;      // (N)
  T* weight;             // (N) attention weight
  T* fraction_x;         // (N)
  T* fraction_y;         // (N)
  T* corner_weight;      // (N, 4) attention weight times bilinear weight
  T* dot;                // (N, 4) of grad_output with the corner's value
  int64_t* position;     // (N, 4) or -1
  const V* zeros;        // (D)
  T* unused;             // (D) where gradients of missing corners go
  const V** corner;      // (N, 4)
};

constexpr size_t ALIGNMENT = 64;

struct Arena {
  char* next;
  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next);
    next += (size_t(count) * sizeof(T) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return taken;
  }
};

size_t workspace_size(const Problem& problem) {
  const size_t samples = size_t(problem.levels * problem.points), channels = size_t(problem.channels);
  return samples * (8 + 4 + 4 + 3 * 8 + 4 * (8 + 8 + 8 + 8)) + channels * 2 * 8 + 16 * ALIGNMENT;
}

template <typename V>
Samples<V> make_samples(const Problem& problem, void* workspace) {
  using T = typename Sum<V>::type;
  Arena arena{static_cast<char*>(workspace)};
  Samples<V> samples;
  const int64_t count = problem.levels * problem.points;
  samples.count = count;
  int64_t* start = arena.take<int64_t>(count);
  int* height = arena.take<int>(count);
  int* width = arena.take<int>(count);
  int64_t position = 0;
  for (int64_t level = 0; level < problem.levels; ++level) {
    const int64_t rows = problem.spatial_shapes[2 * level], columns = problem.spatial_shapes[2 * level + 1];
    for (int64_t point = 0; point < problem.points; ++point) {
      const int64_t sample = level * problem.points + point;
      start[sample] = position;
      height[sample] = int(rows);
      width[sample] = int(columns);
    }
    position += rows * columns;
  }
  samples.start = start;
  samples.height = height;
  samples.width = width;
  samples.weight = arena.take<T>(count);
  samples.fraction_x = arena.take<T>(count);
  samples.fraction_y = arena.take<T>(count);
  samples.corner_weight = arena.take<T>(4 * count);
  samples.dot = arena.take<T>(4 * count);
  samples.position = arena.take<int64_t>(4 * count);
  samples.corner = arena.take<const V*>(4 * count);
  V* zeros = arena.take<V>(problem.channels);
  for (int64_t d = 0; d < problem.channels; ++d) zeros[d] = V{};
  samples.zeros = zeros;
  samples.unused = arena.take<T>(problem.channels);
  for (int64_t d = 0; d < problem.channels; ++d) samples.unused[d] = T(0);
  return samples;
}

// Attention weights of one head: as given, or the softmax of logits.
template <typename V, typename S>
void find_weights(const Problem& problem, const S* attention, Samples<V>& samples) {
  using T = typename Sum<V>::type;
  const int64_t count = samples.count;
  T* __restrict weight = samples.weight;
  for (int64_t n = 0; n < count; ++n) weight[n] = T(to_sum(attention[n]));
  if (!problem.reference_points || count == 0) return;
  T largest = weight[0];
  for (int64_t n = 1; n < count; ++n) largest = weight[n] > largest ? weight[n] : largest;
  for (int64_t n = 0; n < count; ++n) weight[n] = exp_of_negative(weight[n] - largest);
  T sum = T(0);
  for (int64_t n = 0; n < count; ++n) sum += weight[n];
  const T scale = T(1) / sum;
  for (int64_t n = 0; n < count; ++n) weight[n] *= scale;
}

// Positions and weights of the corners of one head's samples.
template <typename V, typename S>
void find_corners(const Problem& problem, int64_t b, int64_t q, int64_t m, Samples<V>& samples) {
  using T = typename Sum<V>::type;
  const int64_t count = samples.count;
  const S* sampling = static_cast<const S*>(problem.sampling) + b * problem.sampling_stride[0] +
                      q * problem.sampling_stride[1] + m * problem.sampling_stride[2];
  const S* attention = static_cast<const S*>(problem.attention) + b * problem.attention_stride[0] +
                       q * problem.attention_stride[1] + m * problem.attention_stride[2];
  find_weights<V, S>(problem, attention, samples);
  const T* reference = nullptr;
  if (problem.reference_points)
    reference = static_cast<const T*>(problem.reference_points) + b * problem.reference_stride[0] +
                q * problem.reference_stride[1];
  for (int64_t n = 0, level = 0, point = 0; n < count; ++n) {
    const int width = samples.width[n], height = samples.height[n];
    T x = T(to_sum(sampling[2 * n])), y = T(to_sum(sampling[2 * n + 1]));
    if (reference) {
      x = coordinate_of_offset(reference[2 * level], x, width);
      y = coordinate_of_offset(reference[2 * level + 1], y, height);
      if (++point == problem.points) point = 0, ++level;
    } else {
      x = coordinate_of_location(x, width);
      y = coordinate_of_location(y, height);
    }
    const AxisPosition<T> column = axis_position(x, width), row = axis_position(y, height);
    samples.fraction_x[n] = column.fraction;
    samples.fraction_y[n] = row.fraction;
    const int64_t position = samples.start[n] + int64_t(row.low) * width + column.low;
    samples.position[4 * n] = row.low_inside & column.low_inside ? position : -1;
    samples.position[4 * n + 1] = row.low_inside & column.high_inside ? position + 1 : -1;
    samples.position[4 * n + 2] = row.high_inside & column.low_inside ? position + width : -1;
    samples.position[4 * n + 3] = row.high_inside & column.high_inside ? position + width + 1 : -1;
    const T weight = samples.weight[n], right = weight * column.fraction, left = weight - right;
    samples.corner_weight[4 * n + 1] = right * (T(1) - row.fraction);
    samples.corner_weight[4 * n] = left * (T(1) - row.fraction);
    samples.corner_weight[4 * n + 2] = left * row.fraction;
    samples.corner_weight[4 * n + 3] = right * row.fraction;
  }
  const V* value = static_cast<const V*>(problem.value) + b * problem.value_stride[0] + m * problem.value_stride[2];
  const int64_t stride = problem.value_stride[1];
  for (int64_t i = 0; i < 4 * count; ++i)
    samples.corner[i] = samples.position[i] < 0 ? samples.zeros : value + samples.position[i] * stride;
}

// output[channel ...] of VECTORS vectors: the weighted sum of corners. Left and right corners have sums of their own,
// because one sum would wait for its own additions.
template <typename V, int VECTORS>
MASK2FORMER_INLINE void sum_corners(const Samples<V>& samples, int64_t channel, V* output) {
  using T = typename Sum<V>::type;
  Vector<T> left[VECTORS], right[VECTORS];
  for (int v = 0; v < VECTORS; ++v) left[v] = right[v] = Vector<T>{};
  const int64_t corners = 4 * samples.count;
  for (int64_t i = 0; i < corners; i += 2) {
    const V* left_value = samples.corner[i] + channel;
    const V* right_value = samples.corner[i + 1] + channel;
    const T left_weight = samples.corner_weight[i], right_weight = samples.corner_weight[i + 1];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) left[v] += left_weight * load(left_value + v * width_of<T>());
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) right[v] += right_weight * load(right_value + v * width_of<T>());
  }
  for (int v = 0; v < VECTORS; ++v) {
    T numbers[width_of<T>()];
    store(numbers, left[v] + right[v]);
    for (int64_t i = 0; i < width_of<T>(); ++i) from_sum(numbers[i], output + channel + v * width_of<T>() + i);
  }
}

template <typename V, typename S>
void forward_of(const Problem& problem, void* output, int64_t first, int64_t last, void* workspace) {
  using T = typename Sum<V>::type;
  Samples<V> samples = make_samples<V>(problem, workspace);
  const int64_t channels = problem.channels;
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / problem.queries, q = row % problem.queries;
    for (int64_t m = 0; m < problem.heads; ++m) {
      find_corners<V, S>(problem, b, q, m, samples);
      V* head = static_cast<V*>(output) + (row * problem.heads + m) * channels;
      int64_t channel = 0;
      for (; channel + 4 * width_of<T>() <= channels; channel += 4 * width_of<T>())
        sum_corners<V, 4>(samples, channel, head);
      if (channel + 2 * width_of<T>() <= channels) {
        sum_corners<V, 2>(samples, channel, head);
        channel += 2 * width_of<T>();
      }
      if (channel + width_of<T>() <= channels) {
        sum_corners<V, 1>(samples, channel, head);
        channel += width_of<T>();
      }
      for (; channel < channels; ++channel) {
        T sum = T(0);
        for (int64_t i = 0; i < 4 * samples.count; ++i)
          sum += samples.corner_weight[i] * to_sum(samples.corner[i][channel]);
        from_sum(sum, head + channel);
      }
    }
  }
}

// For VECTORS vectors of channels: adds to the dots, and each corner's share of grad_output to its sums.
template <typename V, int VECTORS>
MASK2FORMER_INLINE void spread_corners(const Samples<V>& samples, int64_t first, int64_t last, int64_t channel,
                                       const V* grad_output, typename Sum<V>::type* sums, int64_t sums_stride) {
  using T = typename Sum<V>::type;
  Vector<T> grad[VECTORS];
  for (int v = 0; v < VECTORS; ++v) grad[v] = load(grad_output + channel + v * width_of<T>());
  for (int64_t i = 4 * first; i < 4 * last; ++i) {
    const V* value = samples.corner[i] + channel;
    const int64_t position = samples.position[i];
    T* to = (position < 0 ? samples.unused : sums + position * sums_stride) + channel;
    const T weight = samples.corner_weight[i];
    Vector<T> dot{};
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      dot += grad[v] * load(value + v * width_of<T>());
      store(to + v * width_of<T>(), load_plain(to + v * width_of<T>()) + weight * grad[v]);
    }
    samples.dot[i] += sum_of<T>(dot);
  }
}

// weight * (grad - sum of weight * grad), one function for both ways of the backward pass, so that bits are equal.
template <typename T, typename S>
__attribute__((noinline)) void finish_softmax(const T* weight, const T* grad, S* grad_logits, int64_t count) {
  T mean = T(0);
  for (int64_t n = 0; n < count; ++n) mean += weight[n] * grad[n];
  for (int64_t n = 0; n < count; ++n) from_sum(weight[n] * (grad[n] - mean), grad_logits + n);
}

template <typename V, typename S>
void backward_of(const Problem& problem, const BackwardTask& task, void* workspace) {
  using T = typename Sum<V>::type;
  using R = typename Sum<S>::type;  // float64 only where V is
  Samples<V> samples = make_samples<V>(problem, workspace);
  const int64_t channels = problem.channels, count = samples.count, b = task.batch;
  const int64_t first = task.first_level * problem.points, last = task.last_level * problem.points;
  const bool all_levels = task.first_level == 0 && task.last_level == problem.levels;
  for (int64_t q = 0; q < problem.queries; ++q) {
    for (int64_t m = task.first_head; m < task.last_head; ++m) {
      find_corners<V, S>(problem, b, q, m, samples);
      const int64_t row = (b * problem.queries + q) * problem.heads + m;
      const V* grad = static_cast<const V*>(task.grad_output) + row * channels;
      T* sums = static_cast<T*>(task.sums) + m * task.sums_stride[1];
      const int64_t stride = task.sums_stride[0];
      for (int64_t i = 4 * first; i < 4 * last; ++i) samples.dot[i] = T(0);
      int64_t channel = 0;
      for (; channel + 4 * width_of<T>() <= channels; channel += 4 * width_of<T>())
        spread_corners<V, 4>(samples, first, last, channel, grad, sums, stride);
      if (channel + 2 * width_of<T>() <= channels) {
        spread_corners<V, 2>(samples, first, last, channel, grad, sums, stride);
        channel += 2 * width_of<T>();
      }
      if (channel + width_of<T>() <= channels) {
        spread_corners<V, 1>(samples, first, last, channel, grad, sums, stride);
        channel += width_of<T>();
      }
      for (; channel < channels; ++channel) {
        const T grad_here = to_sum(grad[channel]);
        for (int64_t i = 4 * first; i < 4 * last; ++i) {
          samples.dot[i] += grad_here * to_sum(samples.corner[i][channel]);
          if (samples.position[i] >= 0)
            sums[samples.position[i] * stride + channel] += samples.corner_weight[i] * grad_here;
        }
      }
      S* grad_sampling = static_cast<S*>(task.grad_sampling) + row * count * 2;
      S* grad_attention = static_cast<S*>(task.grad_attention) + row * count;
      for (int64_t n = first; n < last; ++n) {
        T* dot = samples.dot + 4 * n;
        const T fx = samples.fraction_x[n], fy = samples.fraction_y[n], weight = samples.weight[n];
        const T top = dot[0] + fx * (dot[1] - dot[0]), bottom = dot[2] + fx * (dot[3] - dot[2]);
        const T slope_x = (dot[1] - dot[0]) + fy * ((dot[3] - dot[2]) - (dot[1] - dot[0]));
        T grad_x = weight * slope_x, grad_y = weight * (bottom - top);
        if (!problem.reference_points) grad_x *= T(samples.width[n]), grad_y *= T(samples.height[n]);
        from_sum(R(grad_x), grad_sampling + 2 * n);
        from_sum(R(grad_y), grad_sampling + 2 * n + 1);
        samples.dot[n] = top + fy * (bottom - top);  // read before: n <= 4 n
      }
      if (problem.reference_points && all_levels) {
        finish_softmax<T, S>(samples.weight, samples.dot, grad_attention, count);
      } else {
        for (int64_t n = first; n < last; ++n) from_sum(R(samples.dot[n]), grad_attention + n);
      }
    }
  }
}

template <typename V, typename S>
void softmax_backward_of(const Problem& problem, void* grad_attention, int64_t first, int64_t last, void* workspace) {
  using T = typename Sum<V>::type;
  Samples<V> samples = make_samples<V>(problem, workspace);
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / problem.queries, q = row % problem.queries;
    for (int64_t m = 0; m < problem.heads; ++m) {
      find_weights<V, S>(problem,
                         static_cast<const S*>(problem.attention) + b * problem.attention_stride[0] +
                             q * problem.attention_stride[1] + m * problem.attention_stride[2],
                         samples);
      S* grad = static_cast<S*>(grad_attention) + (row * problem.heads + m) * samples.count;
      for (int64_t n = 0; n < samples.count; ++n) samples.dot[n] = T(to_sum(grad[n]));
      finish_softmax<T, S>(samples.weight, samples.dot, grad, samples.count);
    }
  }
}

template <typename V>
void round_sums_of(const Problem& problem, const void* sums, void* grad_value, int64_t batch, int64_t head,
                   int64_t first, int64_t last) {
  const int64_t channels = problem.channels;
  for (int64_t position = first; position < last; ++position) {
    const auto* from = static_cast<const typename Sum<V>::type*>(sums) + position * channels;
    V* to = static_cast<V*>(grad_value) + ((batch * problem.positions + position) * problem.heads + head) * channels;
    for (int64_t d = 0; d < channels; ++d) from_sum(from[d], to + d);
  }
}

// Calls FUNCTION<V, S> for the types of `problem`.
#define MASK2FORMER_FOR_TYPES(FUNCTION, ...)                                               \
  switch (problem.value_type) {                                                            \
    case Type::float64:                                                                    \
      return FUNCTION<double, double>(__VA_ARGS__);                                        \
    case Type::float32:                                                                    \
      return FUNCTION<float, float>(__VA_ARGS__);                                          \
    case Type::bfloat16:                                                                   \
      if (problem.sampling_type == Type::float32) return FUNCTION<bfloat16, float>(__VA_ARGS__); \
      return FUNCTION<bfloat16, bfloat16>(__VA_ARGS__);                                    \
    case Type::float16:                                                                    \
      if (problem.sampling_type == Type::float32) return FUNCTION<float16, float>(__VA_ARGS__);  \
      return FUNCTION<float16, float16>(__VA_ARGS__);                                      \
  }

void forward(const Problem& problem, void* output, int64_t first, int64_t last, void* workspace) {
  MASK2FORMER_FOR_TYPES(forward_of, problem, output, first, last, workspace)
}

void backward(const Problem& problem, const BackwardTask& task, void* workspace) {
  MASK2FORMER_FOR_TYPES(backward_of, problem, task, workspace)
}

void softmax_backward(const Problem& problem, void* grad_attention, int64_t first, int64_t last, void* workspace) {
  MASK2FORMER_FOR_TYPES(softmax_backward_of, problem, grad_attention, first, last, workspace)
}

void round_sums(const Problem& problem, const void* sums, void* grad_value, int64_t batch, int64_t head, int64_t first,
                int64_t last) {
  if (problem.value_type == Type::bfloat16)
    round_sums_of<bfloat16>(problem, sums, grad_value, batch, head, first, last);
  else
    round_sums_of<float16>(problem, sums, grad_value, batch, head, first, last);
}

#undef MASK2FORMER_FOR_TYPES

constexpr Kernels KERNELS{workspace_size, forward, backward, softmax_backward, round_sums};

}  // namespace
}  // namespace MASK2FORMER_CAPABILITY
}  // namespace cpu
}  // namespace mask2former
