// The operators on CPU tensors: checks, memory, threads, and the choice of the kernels' capability.
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

Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Type::float64;
    case at::kFloat:
      return Type::float32;
    case at::kBFloat16:
      return Type::bfloat16;
    case at::kHalf:
      return Type::float16;
    default:
      TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16, but is ", tensor.scalar_type());
  }
}

// A tensor whose last `count` dimensions lie in memory as in a contiguous one; copied only if they don't.
Tensor with_contiguous_end(const Tensor& tensor, int64_t count) {
  int64_t expected = 1;
  for (int64_t i = tensor.dim() - 1; i >= tensor.dim() - count; --i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != expected) return tensor.contiguous();
    expected *= tensor.size(i);
  }
  return tensor;
}

// Tensors in the layout that the kernels read, and the problem that points into them.
struct Arguments {
  Tensor value, reference_points, sampling, attention;
  std::vector<int64_t> spatial_shapes;
  Problem problem;
};

std::unique_ptr<Arguments> make_arguments(const Tensor& value, at::IntArrayRef spatial_shapes,
                                          const Tensor& reference_points, const Tensor& sampling,
                                          const Tensor& attention) {
  TORCH_CHECK(value.dim() == 4, "value must be (B, S, M, D), but has shape ", value.sizes());
  TORCH_CHECK(sampling.dim() == 6 && sampling.size(5) == 2,
              "sampling locations or offsets must be (B, Q, M, L, P, 2), but have shape ", sampling.sizes());
  TORCH_CHECK(spatial_shapes.size() == size_t(2 * sampling.size(3)), "spatial_shapes must be height and width of ",
              sampling.size(3), " levels, but are ", spatial_shapes);
  TORCH_CHECK(attention.sizes() == sampling.sizes().slice(0, 5), "attention weights or logits must have shape ",
              sampling.sizes().slice(0, 5), ", but have shape ", attention.sizes());
  TORCH_CHECK(sampling.size(0) == value.size(0) && sampling.size(2) == value.size(2), "value has shape ", value.sizes(),
              " but the sampling tensor ", sampling.sizes(), ": B and M must be equal");
  int64_t cells = 0;
  for (size_t level = 0; level < spatial_shapes.size(); level += 2) {
    TORCH_CHECK(spatial_shapes[level] >= 0 && spatial_shapes[level] < (1 << 24) && spatial_shapes[level + 1] >= 0 &&
                    spatial_shapes[level + 1] < (1 << 24),
                "spatial_shapes must lie between 0 and 2^24, but are ", spatial_shapes);
    cells += spatial_shapes[level] * spatial_shapes[level + 1];
  }
  TORCH_CHECK(cells == value.size(1), "spatial_shapes have ", cells, " cells, but value has ", value.size(1),
              " positions");
  for (const Tensor* tensor : {&value, &sampling, &attention})
    TORCH_CHECK(tensor->device().is_cpu(), "all tensors must be on the CPU, but one is on ", tensor->device());

  auto arguments = std::make_unique<Arguments>();
  Problem& problem = arguments->problem;
  problem.value_type = type_of(value, "value");
  const bool half = problem.value_type == Type::bfloat16 || problem.value_type == Type::float16;
  const bool same = sampling.scalar_type() == value.scalar_type() && attention.scalar_type() == value.scalar_type();
  const at::ScalarType sampling_type = half && !same ? at::kFloat : value.scalar_type();
  arguments->value = with_contiguous_end(value, 1);
  arguments->sampling = with_contiguous_end(sampling.to(sampling_type), 3);
  arguments->attention = with_contiguous_end(attention.to(sampling_type), 2);
  arguments->spatial_shapes = spatial_shapes.vec();
  problem.sampling_type = type_of(arguments->sampling, "the sampling tensor");
  problem.batch = value.size(0);
  problem.positions = value.size(1);
  problem.heads = value.size(2);
  problem.channels = value.size(3);
  problem.queries = sampling.size(1);
  problem.levels = sampling.size(3);
  problem.points = sampling.size(4);
  problem.spatial_shapes = arguments->spatial_shapes.data();
  problem.value = arguments->value.const_data_ptr();
  problem.sampling = arguments->sampling.const_data_ptr();
  problem.attention = arguments->attention.const_data_ptr();
  for (int i = 0; i < 3; ++i) {
    problem.value_stride[i] = arguments->value.stride(i);
    problem.sampling_stride[i] = arguments->sampling.stride(i);
    problem.attention_stride[i] = arguments->attention.stride(i);
  }
  problem.reference_points = nullptr;
  if (reference_points.defined()) {
    TORCH_CHECK(reference_points.dim() == 4 && reference_points.size(1) == sampling.size(1) &&
                    reference_points.size(2) == sampling.size(3) && reference_points.size(3) == 2 &&
                    (reference_points.size(0) == 1 || reference_points.size(0) == value.size(0)),
                "reference_points must be (B or 1, Q, L, 2) with B ", value.size(0), ", Q ", sampling.size(1), ", L ",
                sampling.size(3), ", but have shape ", reference_points.sizes());
    // Never in half precision, whose step near 1 is half a cell of a wide level.
    const Tensor points = reference_points.to(problem.value_type == Type::float64 ? at::kDouble : at::kFloat);
    // Levels may be expanded (stride 0) but are small: a copy of (Q, L, 2) a batch.
    arguments->reference_points = with_contiguous_end(points, 2);
    problem.reference_points = arguments->reference_points.const_data_ptr();
    problem.reference_stride[0] = arguments->reference_points.size(0) == 1 ? 0 : arguments->reference_points.stride(0);
    problem.reference_stride[1] = arguments->reference_points.stride(1);
  }
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
