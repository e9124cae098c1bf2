// The operators on CUDA tensors: memory and streams; kernels.cuh has the kernels.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "kernels.cuh"

namespace mask2former {
namespace cuda {
namespace {

using at::Tensor;

struct Launch {
  cudaStream_t stream;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, Arguments... arguments) const {
    kernel<<<static_cast<unsigned>(blocks), threads_per_block, 0, stream>>>(arguments...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// The arguments, and the problem that points into them.
struct CudaArguments : Arguments {
  CudaArguments(const Tensor& value, at::IntArrayRef spatial_shapes, const Tensor& reference_points,
                const Tensor& sampling, const Tensor& attention)
      : Arguments(value, spatial_shapes, reference_points, sampling, attention), positions(value.size(1)) {
    const int64_t samples = sampling.size(3) * sampling.size(4);  // of an item, counted in 32 bits
    TORCH_CHECK(samples < (1 << 27), "L*P must be below 2^27, but is ", samples);
    describe(problem);
    set_levels();
  }

  bool empty() const { return value.size(1) == 0 || attention.numel() == 0 || problem.channels == 0; }

  int64_t positions;
  Problem problem = {};

 private:
  void set_levels() {
    std::vector<Level> levels;
    int start = 0;
    for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
      levels.push_back({static_cast<int>(spatial_shapes[i]), static_cast<int>(spatial_shapes[i + 1]), start});
      start += levels.back().height * levels.back().width;
    }
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

// Without reference points, locations and weights are given as they are.
Tensor forward(const Tensor& value, at::IntArrayRef spatial_shapes, const Tensor& reference_points,
               const Tensor& sampling, const Tensor& attention) {
  const CudaArguments arguments(value, spatial_shapes, reference_points, sampling, attention);
  const c10::cuda::CUDAGuard guard(value.device());
  const Problem& problem = arguments.problem;
  const std::vector<int64_t> shape = {problem.batch, problem.queries, problem.heads * problem.channels};
  if (arguments.empty()) return at::zeros(shape, value.options());
  const Tensor output = at::empty(shape, value.options());
  const Launch launch{c10::cuda::getCurrentCUDAStream()};
  with_type(arguments.value_type,
            [&](auto kernels) { kernels.forward(launch, problem, output.mutable_data_ptr()); });
  return output;
}

// No sum of fixed-point numbers can be larger: each of the Q * P samples that a level has in a picture and head adds
// at most once to a cell. What isn't finite is left out, since it is marked instead of being added.
Tensor bound_of(const Tensor& grad_output, const CudaArguments& arguments) {
  const auto largest = [](const Tensor& tensor) {
    return at::nan_to_num(tensor.abs(), 0.0, 0.0, 0.0).amax().to(at::kDouble);
  };
  const double most = static_cast<double>(arguments.problem.queries) * static_cast<double>(arguments.problem.points);
  const Tensor bound = largest(grad_output) * most * 1.001;
  return arguments.reference_points.defined() ? bound : bound * largest(arguments.attention);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                            at::IntArrayRef spatial_shapes, const Tensor& reference_points,
                                            const Tensor& sampling, const Tensor& attention) {
  const CudaArguments arguments(value, spatial_shapes, reference_points, sampling, attention);
  const c10::cuda::CUDAGuard guard(value.device());
  const Tensor grad = arguments.checked(grad_output);
  if (arguments.empty())
    return {at::zeros(value.sizes(), value.options()), at::zeros(sampling.sizes(), sampling.options()),
            at::zeros(attention.sizes(), attention.options())};
  const Problem& problem = arguments.problem;
  const auto wide = value.options().dtype(arguments.computing_type);
  const Tensor grad_sampling = at::empty(sampling.sizes(), wide);
  const Tensor grad_attention = at::empty(attention.sizes(), wide);

  Gradients gradients = {};
  gradients.output = grad.const_data_ptr();
  gradients.sampling = grad_sampling.mutable_data_ptr();
  gradients.attention = grad_attention.mutable_data_ptr();
  const Launch launch{c10::cuda::getCurrentCUDAStream()};
  Tensor grad_value;
  if (at::globalContext().deterministicAlgorithms()) {
    const Tensor fixed = at::zeros(value.sizes(), value.options().dtype(at::kLong));
    const Tensor poison = at::zeros({value.size(0), value.size(1), value.size(2), (problem.channels + 31) / 32},
                                    value.options().dtype(at::kInt));
    const Tensor bound = bound_of(grad, arguments);
    gradients.fixed = static_cast<int64_t*>(fixed.mutable_data_ptr());
    gradients.poison = static_cast<uint32_t*>(poison.mutable_data_ptr());
    gradients.bound = static_cast<const double*>(bound.const_data_ptr());
    grad_value = at::empty(value.sizes(), value.options());
    with_type(arguments.value_type, [&](auto kernels) {
      kernels.backward(launch, problem, arguments.positions, gradients);
      kernels.finish(launch, problem, arguments.positions, gradients, grad_value.mutable_data_ptr());
    });
  } else {
    grad_value = at::zeros(value.sizes(), wide);
    gradients.value = grad_value.mutable_data_ptr();
    with_type(arguments.value_type,
              [&](auto kernels) { kernels.backward(launch, problem, arguments.positions, gradients); });
    grad_value = grad_value.to(value.scalar_type());
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
}  // namespace cuda
}  // namespace mask2former

TORCH_LIBRARY_IMPL(mask2former, CUDA, m) {
  m.impl("ms_deform_attn", mask2former::cuda::ms_deform_attn);
  m.impl("ms_deform_attn_backward", mask2former::cuda::ms_deform_attn_backward);
  m.impl("ms_deform_attn_fused", mask2former::cuda::forward);
  m.impl("ms_deform_attn_fused_backward", mask2former::cuda::backward);
}
