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

// What gradients of rows are added to, each (C).
struct NormSums {
  float* weight;
  float* bias;
  float* grad;  // the gradient of what was normed
};

struct PositionWiseKernels {
  // x (n, C) plus bias (C), in place.
  void (*add_bias)(float* x, const float* bias, int64_t rows, int64_t columns);
  // The larger one of that and 0, in place.
  void (*add_bias_and_relu)(float* x, const float* bias, int64_t rows, int64_t columns);
  // x + residual (n, C) + bias (C), in place of x; and the layer norm of that, which may take its place.
  void (*add_and_norm)(float* x, const float* residual, const float* bias, const Norm&, float* normed, int64_t rows,
                       int64_t columns);
  // Of x (n, C).
  void (*layer_norm)(const float* x, const Norm&, float* normed, int64_t rows, int64_t columns);
  // Adds rows of x (n, C) to sums (C).
  void (*add_rows)(const float* x, float* sums, int64_t rows, int64_t columns);
  // The gradient of what a ReLU made features (n, C) of, in place; it is added to sums (C), too.
  void (*relu_backward)(float* grad, const float* features, float* sums, int64_t rows, int64_t columns);
  // The gradient of what was normed, x (n, C), which may take the place of grad.
  void (*norm_backward)(const float* grad, const float* x, const Norm&, float* grad_x, const NormSums&, int64_t rows,
                        int64_t columns);
};

}  // namespace cpu
}  // namespace mask2former
