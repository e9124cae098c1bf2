// What happens between the products of position-wise layers: kernels that go over rows of contiguous float32 once.
#pragma once

#include <stdint.h>

namespace mask2former {
namespace cpu {

struct Norm {
  const float* weight;  // (C)
  const float* bias;    // (C)
  float eps;
};

struct PositionWiseKernels {
  // x (n, C) plus bias (C), in place.
  void (*add_bias)(float* x, const float* bias, int64_t rows, int64_t columns);
  // The larger one of that and 0, in place.
  void (*add_bias_and_relu)(float* x, const float* bias, int64_t rows, int64_t columns);
  // Layer norm of x + residual (n, C) + bias (C), in place of x.
  void (*add_and_norm)(float* x, const float* residual, const float* bias, const Norm&, int64_t rows, int64_t columns);
};

}  // namespace cpu
}  // namespace mask2former
