// Matrices in memory as tensors, for products within what one thread does, and the check of tensors given.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

namespace mask2former {
namespace cpu {

inline void check(const at::Tensor& tensor, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.device().is_cpu() && tensor.sizes() == sizes, name,
              " must be Float on a CPU and have shape ", sizes, ", but is ", tensor.scalar_type(), " on ",
              tensor.device(), " and has shape ", tensor.sizes());
}

// A matrix whose rows are `stride` apart: a tensor of the thread that made it, whatever mode another one is in.
inline at::Tensor matrix(const float* data, int64_t rows, int64_t columns, int64_t stride) {
  return at::from_blob(const_cast<float*>(data), {rows, columns}, {stride, 1}, at::TensorOptions(at::kFloat));
}
inline at::Tensor matrix(const float* data, int64_t rows, int64_t columns) {
  return matrix(data, rows, columns, columns);
}

inline at::Tensor matrix(const at::Tensor& weight) {
  return matrix(weight.const_data_ptr<float>(), weight.size(0), weight.size(1));
}

// a times b, to a matrix or added to what is in it, with our kernel where torch's is slower.
void multiply(const at::Tensor& a, const at::Tensor& b, const at::Tensor& to);
void add_product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& to);
// The same with a contiguous matrix.
inline void multiply(const at::Tensor& a, const at::Tensor& b, float* to) {
  multiply(a, b, matrix(to, a.size(0), b.size(1)));
}
inline void add_product(const at::Tensor& a, const at::Tensor& b, float* to) {
  add_product(a, b, matrix(to, a.size(0), b.size(1)));
}

// Products of as many matrices (n, M, K) and (n, K, N), to (n, M, N) or added to what is there, on all threads.
void multiply_batch(const at::Tensor& a, const at::Tensor& b, const at::Tensor& to);
void add_products_of_batch(const at::Tensor& a, const at::Tensor& b, const at::Tensor& to);

}  // namespace cpu
}  // namespace mask2former
