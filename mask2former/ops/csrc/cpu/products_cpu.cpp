// Products of float32 matrices on a CPU: torch's, or our kernel's where those are slower.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>

#include "kernel.h"
#include "matrices.h"
#include "work.h"

namespace mask2former {
namespace cpu {
namespace {

using at::Tensor;

// Parts of a product that threads share out have at least as many rows and columns, and no fewer products of numbers.
constexpr int64_t FEWEST_ROWS = 12, FEWEST_COLUMNS = 32, FEWEST_PRODUCTS = 1 << 18;

// Of a tensor whose numbers are side by side along one of its dimensions.
bool is_matrix(const Tensor& x) { return x.stride(0) == 1 || x.stride(1) == 1; }
Matrix as_matrix(const Tensor& x) {
  return {x.const_data_ptr<float>(), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}
Matrix rows_of(const Matrix& x, int64_t first, int64_t last) {
  return {x.data + first * x.row_stride, last - first, x.columns, x.row_stride, x.column_stride};
}
Matrix columns_of(const Matrix& x, int64_t first, int64_t last) {
  return {x.data + first * x.column_stride, x.rows, last - first, x.row_stride, x.column_stride};
}

void multiply_here(const Matrix& a, const Matrix& b, bool add, float* to, int64_t stride) {
  const ProductKernels& kernel = kernels().products;
  static thread_local Memory workspace(size_t(kernel.workspace_floats) * sizeof(float));
  kernel.multiply(a, b, add, to, stride, static_cast<float*>(workspace.get()));
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& to, bool add) {
  if (kernels().products.multiply && to.stride(1) == 1 && is_matrix(a) && is_matrix(b))
    return multiply_here(as_matrix(a), as_matrix(b), add, to.mutable_data_ptr<float>(), to.stride(0));
  Tensor result = to;
  if (add)
    at::addmm_out(result, result, a, b);
  else
    at::mm_out(result, a, b);
}

void multiply_batch(const Tensor& a, const Tensor& b, const Tensor& to, bool add) {
  if (!kernels().products.multiply) {
    Tensor result = to;
    if (add)
      at::baddbmm_out(result, result, a, b);
    else
      at::bmm_out(result, a, b);
    return;
  }
  const int64_t count = a.size(0), rows = a.size(1);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), rows / FEWEST_ROWS));
  float* const results = to.mutable_data_ptr<float>();
  at::parallel_for(0, count * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / parts, first = task % parts * rows / parts, last = (task % parts + 1) * rows / parts;
      const Matrix here{a.const_data_ptr<float>() + i * a.stride(0), rows, a.size(2), a.stride(1), a.stride(2)};
      const Matrix other{b.const_data_ptr<float>() + i * b.stride(0), b.size(1), b.size(2), b.stride(1), b.stride(2)};
      multiply_here(rows_of(here, first, last), other, add, results + i * to.stride(0) + first * to.stride(1),
                    to.stride(1));
    }
  });
}

void multiply_on_all_threads(const Matrix& a, const Matrix& b, bool add, float* to, int64_t stride) {
  const int64_t threads = a.rows * a.columns * b.columns < 2 * FEWEST_PRODUCTS ? 1 : at::get_num_threads();
  const auto parts_of = [&](int64_t lines, int64_t fewest, int64_t most) {
    return std::max<int64_t>(1, std::min(most, lines / fewest));
  };
  const int64_t column_parts = parts_of(b.columns, FEWEST_COLUMNS, a.rows > b.columns ? 1 : threads);
  const int64_t row_parts = parts_of(a.rows, FEWEST_ROWS, threads / column_parts);
  at::parallel_for(0, row_parts * column_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / column_parts, column = task % column_parts;
      const int64_t first_row = row * a.rows / row_parts, last_row = (row + 1) * a.rows / row_parts;
      const int64_t first = column * b.columns / column_parts, last = (column + 1) * b.columns / column_parts;
      multiply_here(rows_of(a, first_row, last_row), columns_of(b, first, last), add,
                    to + first_row * stride + first, stride);
    }
  });
}

void multiply_to(const Tensor& a, const Tensor& b, Tensor to, bool add) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0),
              "a must be (M, K) and b (K, N), but they have shapes ", a.sizes(), " and ", b.sizes());
  check(a, a.sizes(), "a");
  check(b, b.sizes(), "b");
  check(to, {a.size(0), b.size(1)}, "to");
  if (!(has_faster_products() && is_matrix(a) && is_matrix(b) && is_matrix(to))) {
    if (add)
      at::addmm_out(to, to, a, b);
    else
      at::mm_out(to, a, b);
  } else if (to.stride(1) == 1) {
    multiply_on_all_threads(as_matrix(a), as_matrix(b), add, to.mutable_data_ptr<float>(), to.stride(0));
  } else {
    multiply_on_all_threads(as_matrix(b.t()), as_matrix(a.t()), add, to.mutable_data_ptr<float>(), to.stride(1));
  }
}

}  // namespace

void multiply(const Tensor& a, const Tensor& b, const Tensor& to) { multiply(a, b, to, false); }
void add_product(const Tensor& a, const Tensor& b, const Tensor& to) { multiply(a, b, to, true); }
void multiply_batch(const Tensor& a, const Tensor& b, const Tensor& to) { multiply_batch(a, b, to, false); }
void add_products_of_batch(const Tensor& a, const Tensor& b, const Tensor& to) { multiply_batch(a, b, to, true); }

TORCH_LIBRARY_FRAGMENT(mask2former, m) { m.def("has_faster_products", has_faster_products); }
TORCH_LIBRARY_IMPL(mask2former, CPU, m) { m.impl("multiply", multiply_to); }

}  // namespace cpu
}  // namespace mask2former
