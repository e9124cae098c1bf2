// The operators' arguments on every device: checked, in the types that kernels compute with, in the layout they read.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "ms_deform_attn.h"

namespace mask2former {

inline Type type_of(const at::Tensor& tensor, const char* name) {
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
inline at::Tensor with_contiguous_end(const at::Tensor& tensor, int64_t count) {
  int64_t expected = 1;
  for (int64_t i = tensor.dim() - 1; i >= tensor.dim() - count; --i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != expected) return tensor.contiguous();
    expected *= tensor.size(i);
  }
  return tensor;
}

// Letters are those of the schemas in ms_deform_attn.cpp. `sampling` is locations and `attention` weights, or, with
// reference points, offsets and logits.
struct Arguments {
  // Throws where they don't fit together. `reference_points` may be undefined.
  Arguments(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& reference_points,
            const at::Tensor& sampling, const at::Tensor& attention)
      : value_type(type_of(value, "value")),
        computing_type(value_type == Type::float64 ? at::kDouble : at::kFloat),
        spatial_shapes(spatial_shapes.vec()) {
    TORCH_CHECK(value.dim() == 4, "value must be (B, S, M, D), but has shape ", value.sizes());
    const char* const sampling_name = reference_points.defined() ? "sampling_offsets" : "sampling_locations";
    const char* const attention_name = reference_points.defined() ? "attention_logits" : "attention_weights";
    TORCH_CHECK(sampling.dim() == 6 && sampling.size(0) == value.size(0) && sampling.size(2) == value.size(2) &&
                    sampling.size(5) == 2,
                sampling_name, " must be (B, Q, M, L, P, 2) with B ", value.size(0), " and M ", value.size(2),
                ", but have shape ", sampling.sizes());
    TORCH_CHECK(attention.sizes() == sampling.sizes().slice(0, 5), attention_name, " must have shape ",
                sampling.sizes().slice(0, 5), ", but have shape ", attention.sizes());
    check_shapes(sampling.size(3), value.size(1));
    this->value = with_contiguous_end(value, 1);
    this->sampling = with_contiguous_end(to_compute_with(sampling, sampling_name), 3);
    this->attention = with_contiguous_end(to_compute_with(attention, attention_name), 2);
    if (!reference_points.defined()) return;
    TORCH_CHECK(reference_points.dim() == 4 &&
                    (reference_points.size(0) == 1 || reference_points.size(0) == value.size(0)) &&
                    reference_points.size(1) == sampling.size(1) && reference_points.size(2) == sampling.size(3) &&
                    reference_points.size(3) == 2,
                "reference_points must be (B or 1, Q, L, 2) with B ", value.size(0), ", Q ", sampling.size(1),
                " and L ", sampling.size(3), ", but have shape ", reference_points.sizes());
    // Levels may be expanded (stride 0) but are small: a copy of (Q, L, 2) a picture.
    this->reference_points = with_contiguous_end(to_compute_with(reference_points, "reference_points"), 2);
  }

  // The gradient of the output as kernels read it: contiguous, in value's type.
  at::Tensor checked(const at::Tensor& grad_output) const {
    const int64_t batch = value.size(0), queries = sampling.size(1), channels = value.size(2) * value.size(3);
    TORCH_CHECK(grad_output.dim() == 3 && grad_output.size(0) == batch && grad_output.size(1) == queries &&
                    grad_output.size(2) == channels,
                "grad_output must be (", batch, ", ", queries, ", ", channels, "), but has shape ",
                grad_output.sizes());
    check_device(grad_output, "grad_output");
    return grad_output.to(value.scalar_type()).contiguous();
  }

  // Sets the sizes, pointers and strides that the problems of all devices have.
  template <typename Problem>
  void describe(Problem& problem) const {
    problem.batch = value.size(0);
    problem.heads = value.size(2);
    problem.channels = value.size(3);
    problem.queries = sampling.size(1);
    problem.levels = static_cast<decltype(problem.levels)>(sampling.size(3));
    problem.points = static_cast<decltype(problem.points)>(sampling.size(4));
    problem.value = value.const_data_ptr();
    problem.sampling = sampling.const_data_ptr();
    problem.attention = attention.const_data_ptr();
    for (int i = 0; i < 3; ++i) {
      problem.value_stride[i] = value.stride(i);
      problem.sampling_stride[i] = sampling.stride(i);
      problem.attention_stride[i] = attention.stride(i);
    }
    problem.reference_points = nullptr;
    if (!reference_points.defined()) return;
    problem.reference_points = reference_points.const_data_ptr();
    problem.reference_stride[0] = reference_points.size(0) == 1 ? 0 : reference_points.stride(0);
    problem.reference_stride[1] = reference_points.stride(1);
  }

  Type value_type;
  // Of everything but value: float32 for half precision too, whose step near 1 is half a cell of a wide level.
  at::ScalarType computing_type;
  std::vector<int64_t> spatial_shapes;
  at::Tensor value;             // (B, S, M, D), D contiguous
  at::Tensor reference_points;  // (B or 1, Q, L, 2), (L, 2) contiguous; or undefined
  at::Tensor sampling;          // (B, Q, M, L, P, 2), (L, P, 2) contiguous
  at::Tensor attention;         // (B, Q, M, L, P), (L, P) contiguous

 private:
  void check_shapes(int64_t levels, int64_t positions) const {
    // Kernels count them in 32 bits, with room for a row of a level more.
    TORCH_CHECK(positions < (1 << 30), "value must have fewer than 2^30 positions, but has ", positions);
    const at::IntArrayRef shapes(spatial_shapes);
    TORCH_CHECK(static_cast<int64_t>(shapes.size()) == 2 * levels, "spatial_shapes must be height and width of ",
                levels, " levels, but are ", shapes);
    constexpr int64_t limit = 1 << 24;  // every float32 below it has its integer, and products don't overflow
    int64_t cells = 0;
    for (size_t level = 0; level < shapes.size(); level += 2) {
      const int64_t height = shapes[level], width = shapes[level + 1];
      TORCH_CHECK(height >= 0 && height < limit && width >= 0 && width < limit,
                  "spatial_shapes must lie between 0 and 2^24, but are ", shapes);
      cells += height * width;
      if (cells > positions) break;
    }
    TORCH_CHECK(cells == positions, "spatial_shapes ", shapes, " must have as many cells as value has positions, ",
                positions);
  }

  void check_device(const at::Tensor& tensor, const char* name) const {
    TORCH_CHECK(tensor.device() == value.device(), "all tensors must be on one device, but ", name, " on ",
                tensor.device(), " and value on ", value.device());
  }

  at::Tensor to_compute_with(const at::Tensor& tensor, const char* name) const {
    check_device(tensor, name);
    type_of(tensor, name);  // throws where it is no such number
    return tensor.to(computing_type);
  }
};

}  // namespace mask2former
