// The operators on CPU tensors: memory, threads, and the choice of the kernels' capability.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "kernel.h"

namespace mask2former {
namespace cpu {
namespace {

using at::Tensor;

// Follows torch's own choice, and so ATEN_CPU_CAPABILITY.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__GNUC__) && defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && capability == "AVX512") return kernels_avx512();
    if (avx2 && (capability == "AVX512" || capability == "AVX2")) return kernels_avx2();
#endif
    return kernels_default();
  }();
  return chosen;
}

// The arguments, and the problem that points into them.
struct CpuArguments : Arguments {
  using Arguments::Arguments;
  Problem problem;
};

std::unique_ptr<CpuArguments> make_arguments(const Tensor& value, at::IntArrayRef spatial_shapes,
                                             const Tensor& reference_points, const Tensor& sampling,
                                             const Tensor& attention) {
  auto arguments =
      std::make_unique<CpuArguments>(value, spatial_shapes, reference_points, sampling, attention);
  Problem& problem = arguments->problem;
  arguments->describe(problem);
  problem.value_type = arguments->value_type;
  problem.sampling_type = arguments->value_type == Type::float64 ? Type::float64 : Type::float32;
  problem.positions = value.size(1);
  problem.spatial_shapes = arguments->spatial_shapes.data();
  return arguments;
}

// Memory of one thread, aligned as the kernels need it.
class Workspace {
 public:
  explicit Workspace(const Problem& problem) : bytes_(kernels().workspace_size(problem) + 64) {}
  void* get() {
    const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

 private:
  std::vector<char> bytes_;
};

Tensor forward(const Tensor& value, at::IntArrayRef spatial_shapes, const Tensor& reference_points,
               const Tensor& sampling, const Tensor& attention) {
  const auto arguments = make_arguments(value, spatial_shapes, reference_points, sampling, attention);
  const Problem& problem = arguments->problem;
  Tensor output = at::empty({problem.batch, problem.queries, problem.heads * problem.channels},
                            value.options().memory_format(c10::nullopt));
  void* data = output.mutable_data_ptr();
  at::parallel_for(0, problem.batch * problem.queries, 16, [&](int64_t first, int64_t last) {
    Workspace workspace(problem);
    kernels().forward(problem, data, first, last, workspace.get());
  });
  return output;
}

// Tasks own parts of grad_value, and each goes over the queries in order: a cell's sum has the same order of additions
// for any number of threads. A task is one head of one picture, or one level of it where there are more threads.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                            at::IntArrayRef spatial_shapes, const Tensor& reference_points,
                                            const Tensor& sampling, const Tensor& attention) {
  const auto arguments = make_arguments(value, spatial_shapes, reference_points, sampling, attention);
  const Problem& problem = arguments->problem;
  TORCH_CHECK(grad_output.dim() == 3 && grad_output.size(0) == problem.batch &&
                  grad_output.size(1) == problem.queries && grad_output.size(2) == problem.heads * problem.channels,
              "grad_output must be (", problem.batch, ", ", problem.queries, ", ", problem.heads * problem.channels,
              "), but has shape ", grad_output.sizes());
  const Tensor grad = grad_output.to(value.scalar_type()).contiguous();
  const bool half = problem.value_type == Type::bfloat16 || problem.value_type == Type::float16;
  const auto options = value.options().memory_format(c10::nullopt);
  Tensor grad_value = half ? at::empty(value.sizes(), options) : at::zeros(value.sizes(), options);
  Tensor grad_sampling = at::empty(sampling.sizes(), options.dtype(arguments->sampling.scalar_type()));
  Tensor grad_attention = at::empty(attention.sizes(), options.dtype(arguments->sampling.scalar_type()));
  const void* grad_data = grad.const_data_ptr();
  char* value_data = static_cast<char*>(grad_value.mutable_data_ptr());
  void* sampling_data = grad_sampling.mutable_data_ptr();
  void* attention_data = grad_attention.mutable_data_ptr();
  const int64_t row = problem.heads * problem.channels, picture = problem.positions * row;

  const int64_t heads = problem.batch * problem.heads;
  // Half-precision gradients of weights would be rounded between the two passes.
  const bool by_level = at::get_num_threads() > heads && problem.levels > 1 && problem.sampling_type != Type::bfloat16 &&
                        problem.sampling_type != Type::float16;
  const int64_t parts = by_level ? problem.levels : 1;
  at::parallel_for(0, heads * parts, 1, [&](int64_t first, int64_t last) {
    Workspace workspace(problem);
    std::vector<float> head_sums(half ? problem.positions * problem.channels : 0);
    for (int64_t unit = first; unit < last;) {
      const int64_t part = unit % parts, head = unit / parts % problem.heads, batch = unit / parts / problem.heads;
      BackwardTask task{};
      task.grad_output = grad_data;
      task.grad_sampling = sampling_data;
      task.grad_attention = attention_data;
      task.batch = batch;
      task.first_head = head;
      task.last_head = head + 1;
      task.first_level = by_level ? part : 0;
      task.last_level = by_level ? part + 1 : problem.levels;
      if (half) {
        std::fill(head_sums.begin(), head_sums.end(), 0.0f);
        task.sums = head_sums.data();
        task.sums_stride[0] = problem.channels;
        task.sums_stride[1] = 0;
      } else {
        // Neighbouring heads of a picture together: their channels are neighbours in memory.
        if (!by_level) task.last_head = std::min(problem.heads, head + (last - unit));
        task.sums = value_data + batch * picture * grad_value.element_size();
        task.sums_stride[0] = row;
        task.sums_stride[1] = problem.channels;
      }
      kernels().backward(problem, task, workspace.get());
      if (half) {
        int64_t begin = 0, end = 0;
        for (int64_t level = 0; level < task.last_level; ++level) {
          if (level == task.first_level) begin = end;
          end += problem.spatial_shapes[2 * level] * problem.spatial_shapes[2 * level + 1];
        }
        kernels().round_sums(problem, head_sums.data(), value_data, batch, head, begin, end);
      }
      unit += task.last_head - task.first_head;
    }
  });
  if (by_level && problem.reference_points) {
    at::parallel_for(0, problem.batch * problem.queries, 16, [&](int64_t first, int64_t last) {
      Workspace workspace(problem);
      kernels().softmax_backward(problem, attention_data, first, last, workspace.get());
    });
  }
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
