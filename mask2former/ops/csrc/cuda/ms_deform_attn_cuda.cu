// The operators on CUDA tensors: checks, strides and memory; kernels.cuh has the kernels.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "kernels.cuh"

namespace mask2former {
namespace cuda {
namespace {

using at::Tensor;

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

struct Launch {
  cudaStream_t stream;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, Arguments... arguments) const {
    kernel<<<static_cast<unsigned>(blocks), threads_per_block, 0, stream>>>(arguments...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// Whether the dimensions from `first` on lie in memory without gaps, in order.
bool contiguous_from(const Tensor& tensor, int64_t first) {
  int64_t expected = 1;
  for (int64_t i = tensor.dim() - 1; i >= first; --i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != expected) return false;
    expected *= tensor.size(i);
  }
  return true;
}

Tensor made_contiguous_from(const Tensor& tensor, int64_t first) {
  return contiguous_from(tensor, first) ? tensor : tensor.contiguous();
}

// The inputs as the kernels take them, with the tensors that own the memory.
class Inputs {
 public:
  Inputs(const Tensor& value, c10::SymIntArrayRef spatial_shapes, const Tensor* reference_points,
         const Tensor& sampling, const Tensor& attention)
      : value(made_contiguous_from(value, 3)),
        reference_points(reference_points ? made_contiguous_from(*reference_points, 2) : Tensor()),
        sampling(made_contiguous_from(sampling, 3)),
        attention(made_contiguous_from(attention, 3)) {
    check_shapes(spatial_shapes);
    value_type = type_of(value, "value");
    sampling_type = type_of(sampling, "the sampling tensors");
    TORCH_CHECK(sampling_type == value_type || sampling_type == Type::float32,
                "sampling tensors must be in the dtype of value, ", value.scalar_type(), ", or float32, but are ",
                sampling.scalar_type());
    positions = value.size(1);
    problem.batch = value.size(0);
    problem.heads = value.size(2);
    problem.channels = value.size(3);
    problem.queries = sampling.size(1);
    problem.levels = static_cast<int>(sampling.size(3));
    problem.points = static_cast<int>(sampling.size(4));
    set_levels(spatial_shapes);
    problem.value = this->value.const_data_ptr();
    problem.sampling = this->sampling.const_data_ptr();
    problem.attention = this->attention.const_data_ptr();
    for (int i = 0; i < 3; ++i) {
      problem.value_stride[i] = this->value.stride(i);
      problem.sampling_stride[i] = this->sampling.stride(i);
      problem.attention_stride[i] = this->attention.stride(i);
    }
    if (reference_points) {
      const Tensor& points = this->reference_points;
      problem.reference_points = points.const_data_ptr();
      problem.reference_stride[0] = points.size(0) == 1 ? 0 : points.stride(0);
      problem.reference_stride[1] = points.stride(1);
    }
  }

  bool empty() const {
    return problem.batch == 0 || problem.queries == 0 || problem.heads == 0 || problem.channels == 0 ||
           problem.levels == 0 || problem.points == 0;
  }

  Tensor value, reference_points, sampling, attention;
  Type value_type, sampling_type;
  int64_t positions;
  Problem problem = {};

 private:
  void check_shapes(c10::SymIntArrayRef spatial_shapes) const {
    TORCH_CHECK(value.dim() == 4, "value must be (B, S, M, D), but has shape ", value.sizes());
    TORCH_CHECK(sampling.dim() == 6 && sampling.size(0) == value.size(0) && sampling.size(2) == value.size(2) &&
                    sampling.size(3) * 2 == static_cast<int64_t>(spatial_shapes.size()) && sampling.size(5) == 2,
                "locations or offsets must be (B, Q, M, L, P, 2), but have shape ", sampling.sizes());
    TORCH_CHECK(attention.sizes() == sampling.sizes().slice(0, 5),
                "weights or logits must be (B, Q, M, L, P), but have shape ", attention.sizes());
    TORCH_CHECK(attention.scalar_type() == sampling.scalar_type() && attention.device() == value.device() &&
                    sampling.device() == value.device(),
                "sampling tensors must share a dtype, and the device of value");
    // 27 bits for a width, and positions beside the map must be countable too
    TORCH_CHECK(value.size(1) < (1 << 27) && sampling.size(3) * sampling.size(4) < (1 << 27),
                "at most 2^27 positions and samples are possible");
    if (!reference_points.defined()) return;
    TORCH_CHECK(reference_points.dim() == 4 &&
                    (reference_points.size(0) == 1 || reference_points.size(0) == value.size(0)) &&
                    reference_points.size(1) == sampling.size(1) && reference_points.size(2) == sampling.size(3) &&
                    reference_points.size(3) == 2 && reference_points.scalar_type() == sampling.scalar_type() &&
                    reference_points.device() == value.device(),
                "reference_points must be (B or 1, Q, L, 2), in the offsets' dtype and on their device, but have shape "
                "and dtype ",
                reference_points.sizes(), ", ", reference_points.scalar_type());
  }

  void set_levels(c10::SymIntArrayRef spatial_shapes) {
    std::vector<Level> levels;
    int64_t start = 0;
    for (size_t i = 0; i + 1 < spatial_shapes.size(); i += 2) {
      const int64_t height = spatial_shapes[i].expect_int(), width = spatial_shapes[i + 1].expect_int();
      TORCH_CHECK(height >= 0 && width >= 0 && height * width <= positions - start, "spatial_shapes have more than ",
                  positions, " cells");
      levels.push_back({static_cast<int>(height), static_cast<int>(width), static_cast<int>(start)});
      start += height * width;
    }
    TORCH_CHECK(start == positions, "spatial_shapes have ", start, " cells, but value has ", positions, " positions");
    problem.queries_are_positions = problem.queries == positions;
    if (levels.size() <= inline_levels) {
      std::copy(levels.begin(), levels.end(), problem.level);
      return;
    }
    static_assert(sizeof(Level) == 3 * sizeof(int), "a row of three integers");
    many_levels_ = at::from_blob(levels.data(), {static_cast<int64_t>(levels.size()), 3}, at::kInt).to(value.device());
    problem.all_levels = static_cast<const Level*>(many_levels_.const_data_ptr());
  }

  Tensor many_levels_;
};

Tensor forward(const Tensor& value, c10::SymIntArrayRef spatial_shapes, const Tensor* reference_points,
               const Tensor& sampling, const Tensor& attention) {
  const c10::cuda::CUDAGuard guard(value.device());
  const Inputs inputs(value, spatial_shapes, reference_points, sampling, attention);
  const Problem& problem = inputs.problem;
  const at::IntArrayRef::value_type width = problem.heads * problem.channels;
  if (inputs.empty()) return at::zeros({problem.batch, problem.queries, width}, value.options());
  const Tensor output = at::empty({problem.batch, problem.queries, width}, value.options());
  const Launch launch{c10::cuda::getCurrentCUDAStream()};
  with_types(inputs.value_type, inputs.sampling_type,
             [&](auto kernels) { kernels.forward(launch, problem, output.mutable_data_ptr()); });
  return output;
}

// No sum of fixed-point numbers can be larger: each of the Q * P samples that a level has in a picture and head adds
// at most once to a cell. What isn't finite is left out, since it is marked instead of being added.
Tensor bound_of(const Tensor& grad_output, const Inputs& inputs) {
  const auto largest = [](const Tensor& tensor) {
    return at::nan_to_num(tensor.abs(), 0.0, 0.0, 0.0).amax().to(at::kDouble);
  };
  const double most = static_cast<double>(inputs.problem.queries) * static_cast<double>(inputs.problem.points);
  const Tensor bound = largest(grad_output) * most;
  return inputs.reference_points.defined() ? bound * 1.001 : bound * largest(inputs.attention) * 1.001;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output_given, const Tensor& value,
                                            c10::SymIntArrayRef spatial_shapes, const Tensor* reference_points,
                                            const Tensor& sampling, const Tensor& attention) {
  const c10::cuda::CUDAGuard guard(value.device());
  const Inputs inputs(value, spatial_shapes, reference_points, sampling, attention);
  const Problem& problem = inputs.problem;
  TORCH_CHECK(grad_output_given.dim() == 3 && grad_output_given.size(0) == problem.batch &&
                  grad_output_given.size(1) == problem.queries &&
                  grad_output_given.size(2) == problem.heads * problem.channels &&
                  grad_output_given.scalar_type() == value.scalar_type() &&
                  grad_output_given.device() == value.device(),
              "grad_output must be (B, Q, M*D) in the dtype and on the device of value, but has shape ",
              grad_output_given.sizes(), ", ", grad_output_given.scalar_type());
  if (inputs.empty())
    return {at::zeros(value.sizes(), value.options()), at::zeros(sampling.sizes(), sampling.options()),
            at::zeros(attention.sizes(), attention.options())};
  const Tensor grad_output = grad_output_given.contiguous();
  const Tensor grad_sampling = at::empty(sampling.sizes(), sampling.options());
  const Tensor grad_attention = at::empty(attention.sizes(), attention.options());
  const at::ScalarType wide = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor scratch = grad_attention;
  if (reference_points && attention.scalar_type() != wide)
    scratch = at::empty(attention.sizes(), attention.options().dtype(wide));

  Gradients gradients = {};
  gradients.output = grad_output.const_data_ptr();
  gradients.sampling = grad_sampling.mutable_data_ptr();
  gradients.attention = grad_attention.mutable_data_ptr();
  gradients.scratch = scratch.mutable_data_ptr();
  const Launch launch{c10::cuda::getCurrentCUDAStream()};
  Tensor grad_value;
  if (at::globalContext().deterministicAlgorithms()) {
    const Tensor fixed = at::zeros(value.sizes(), value.options().dtype(at::kLong));
    const Tensor poison = at::zeros({value.size(0), value.size(1), value.size(2), (problem.channels + 31) / 32},
                                    value.options().dtype(at::kInt));
    const Tensor bound = bound_of(grad_output, inputs);
    gradients.fixed = static_cast<int64_t*>(fixed.mutable_data_ptr());
    gradients.poison = static_cast<uint32_t*>(poison.mutable_data_ptr());
    gradients.bound = static_cast<const double*>(bound.const_data_ptr());
    grad_value = at::empty(value.sizes(), value.options());
    with_types(inputs.value_type, inputs.sampling_type, [&](auto kernels) {
      kernels.backward(launch, problem, inputs.positions, gradients);
      kernels.finish(launch, problem, inputs.positions, gradients, grad_value.mutable_data_ptr());
    });
  } else {
    grad_value = at::zeros(value.sizes(), value.options().dtype(wide));
    gradients.value = grad_value.mutable_data_ptr();
    with_types(inputs.value_type, inputs.sampling_type,
               [&](auto kernels) { kernels.backward(launch, problem, inputs.positions, gradients); });
    grad_value = grad_value.to(value.scalar_type());
  }
  return {grad_value, grad_sampling, grad_attention};
}

Tensor ms_deform_attn(const Tensor& value, c10::SymIntArrayRef spatial_shapes, const Tensor& sampling_locations,
                      const Tensor& attention_weights) {
  return forward(value, spatial_shapes, nullptr, sampling_locations, attention_weights);
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad_output, const Tensor& value,
                                                           c10::SymIntArrayRef spatial_shapes,
                                                           const Tensor& sampling_locations,
                                                           const Tensor& attention_weights) {
  return backward(grad_output, value, spatial_shapes, nullptr, sampling_locations, attention_weights);
}

Tensor ms_deform_attn_fused(const Tensor& value, c10::SymIntArrayRef spatial_shapes, const Tensor& reference_points,
                            const Tensor& sampling_offsets, const Tensor& attention_logits) {
  return forward(value, spatial_shapes, &reference_points, sampling_offsets, attention_logits);
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(const Tensor& grad_output, const Tensor& value,
                                                                 c10::SymIntArrayRef spatial_shapes,
                                                                 const Tensor& reference_points,
                                                                 const Tensor& sampling_offsets,
                                                                 const Tensor& attention_logits) {
  return backward(grad_output, value, spatial_shapes, &reference_points, sampling_offsets, attention_logits);
}

}  // namespace
}  // namespace cuda
}  // namespace mask2former

TORCH_LIBRARY_IMPL(mask2former, CUDA, m) {
  m.impl("ms_deform_attn", mask2former::cuda::ms_deform_attn);
  m.impl("ms_deform_attn_backward", mask2former::cuda::ms_deform_attn_backward);
  m.impl("ms_deform_attn_fused", mask2former::cuda::ms_deform_attn_fused);
  m.impl("ms_deform_attn_fused_backward", mask2former::cuda::ms_deform_attn_fused_backward);
}
