// Deformable attention on CPU tensors: memory and threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../arguments.h"
#include "kernel.h"
#include "work.h"

namespace mask2former {
namespace cpu {
namespace {

using at::Tensor;

// The arguments, and the problem that points into them.
struct CpuArguments : Arguments {
  CpuArguments(const Tensor& value, at::IntArrayRef spatial_shapes, const Tensor& reference_points,
               const Tensor& sampling, const Tensor& attention)
      : Arguments(value, spatial_shapes, reference_points, sampling, attention) {
    describe(problem);
    problem.value_type = value_type;
    problem.positions = value.size(1);
    problem.spatial_shapes = this->spatial_shapes.data();
  }

  Problem problem = {};
};

// Calls function(first, last, workspace) for parts of `count` pieces of work, on all threads.
template <typename Function>
void in_parallel(const Problem& problem, int64_t count, int64_t fewest, Function function) {
  at::parallel_for(0, count, fewest, [&](int64_t first, int64_t last) {
    Memory workspace(kernels().workspace_size(problem));
    function(first, last, workspace.get());
  });
}

constexpr int64_t FEWEST_ROWS = 16;  // of (B*Q) for one thread

Tensor forward(const Tensor& value, at::IntArrayRef spatial_shapes, const Tensor& reference_points,
               const Tensor& sampling, const Tensor& attention) {
  const CpuArguments arguments(value, spatial_shapes, reference_points, sampling, attention);
  const Problem& problem = arguments.problem;
  Tensor output = at::empty({problem.batch, problem.queries, problem.heads * problem.channels},
                            value.options().memory_format(c10::nullopt));
  void* data = output.mutable_data_ptr();
  in_parallel(problem, problem.batch * problem.queries, FEWEST_ROWS, [&](int64_t first, int64_t last, void* workspace) {
    kernels().forward(problem, data, first, last, workspace);
  });
  return output;
}

// Memory for the sums of one strip, of any size that the second cache holds most of.
constexpr int64_t STRIP_BYTES = 1 << 20;

// The gradient of value is summed up strip after strip, each by one thread that goes over the queries in order: a
// cell's sum has the same order of additions for any number of threads. Summing in a thread's own memory, in float32
// where value is of a half type, means that nothing of the size of value is needed but the gradient itself.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                            at::IntArrayRef spatial_shapes, const Tensor& reference_points,
                                            const Tensor& sampling, const Tensor& attention) {
  const CpuArguments arguments(value, spatial_shapes, reference_points, sampling, attention);
  const Problem& problem = arguments.problem;
  const Tensor grad = arguments.checked(grad_output);
  const auto options = value.options().memory_format(c10::nullopt);
  const auto sampling_options = options.dtype(arguments.computing_type);
  Tensor grad_value = at::empty(value.sizes(), options);
  Tensor grad_sampling = at::empty(sampling.sizes(), sampling_options);
  Tensor grad_attention = at::empty(attention.sizes(), sampling_options);
  const Gradients gradients{grad.const_data_ptr(), grad_value.mutable_data_ptr(), grad_sampling.mutable_data_ptr(),
                            grad_attention.mutable_data_ptr()};

  const int64_t rows = problem.batch * problem.queries, heads = problem.batch * problem.heads;
  in_parallel(problem, rows, FEWEST_ROWS, [&](int64_t first, int64_t last, void* workspace) {
    kernels().place_samples(problem, gradients, first, last, workspace);
  });

  const int64_t cell_bytes = problem.channels * int64_t(problem.value_type == Type::float64 ? 8 : 4);
  const int64_t longest = std::max<int64_t>(1, STRIP_BYTES / std::max<int64_t>(1, cell_bytes));
  const int64_t threads_a_head = divide_up(at::get_num_threads(), std::max<int64_t>(1, heads));
  const int64_t strips = std::max(divide_up(problem.positions, longest), threads_a_head);
  const int64_t length = divide_up(problem.positions, strips);
  in_parallel(problem, heads * strips, 1, [&](int64_t first, int64_t last, void* workspace) {
    Memory sums(length * cell_bytes);
    for (int64_t i = first; i < last; ++i) {
      const int64_t head = i / strips, begin = std::min(problem.positions, i % strips * length);
      const int64_t end = std::min(problem.positions, begin + length);
      const Strip strip{head / problem.heads, head % problem.heads, begin, end, sums.get()};
      kernels().value_backward(problem, gradients, strip, workspace);
    }
  });

  in_parallel(problem, rows, FEWEST_ROWS, [&](int64_t first, int64_t last, void* workspace) {
    kernels().sampling_backward(problem, gradients, first, last, workspace);
  });
  return {grad_value, grad_sampling.to(sampling.scalar_type()), grad_attention.to(attention.scalar_type())};
}

Tensor ms_deform_attn(const Tensor& value, at::IntArrayRef spatial_shapes, const Tensor& sampling_locations,
                      const Tensor& attention_weights) {
  return forward(value, spatial_shapes, Tensor(), sampling_locations, attention_weights);
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad_output, const Tensor& value,
                                                           at::IntArrayRef spatial_shapes,
                                                           const Tensor& sampling_locations,
                                                           const Tensor& attention_weights) {
  return backward(grad_output, value, spatial_shapes, Tensor(), sampling_locations, attention_weights);
}

}  // namespace

TORCH_LIBRARY_IMPL(mask2former, CPU, m) {
  m.impl("ms_deform_attn", ms_deform_attn);
  m.impl("ms_deform_attn_backward", ms_deform_attn_backward);
  m.impl("ms_deform_attn_fused", forward);
  m.impl("ms_deform_attn_fused_backward", backward);
}

}  // namespace cpu
}  // namespace mask2former
