// Products of float32 matrices: what their kernel works on.
#pragma once

#include <stdint.h>

namespace mask2former {
namespace cpu {

// Numbers at row * row_stride + column * column_stride, where one of both strides is 1.
struct Matrix {
  const float* data;
  int64_t rows, columns, row_stride, column_stride;
};

// Of capabilities with which torch's products aren't slower, nothing.
struct ProductKernels {
  int64_t workspace_floats;
  // a (M, K) times b (K, N) to `to`, whose rows are `stride` apart and nowhere in a or b; or added to what is there.
  void (*multiply)(const Matrix& a, const Matrix& b, bool add, float* to, int64_t stride, float* workspace);
};

}  // namespace cpu
}  // namespace mask2former
