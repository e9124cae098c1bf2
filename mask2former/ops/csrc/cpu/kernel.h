// What a CPU kernel works on: plain pointers and sizes, so that a kernel's file needs no header of torch.
#pragma once

#include <stdint.h>

namespace mask2former {
namespace cpu {

enum class Type { float64, float32, bfloat16, float16 };

// Strides count elements. value's D, and the (L, P, 2) or (L, P) of the sampling tensors, are contiguous.
struct Problem {
  Type value_type;     // of value, output, grad_output and grad_value
  Type sampling_type;  // of reference_points, sampling and attention and their gradients: value_type, or float32
  int64_t batch, positions, queries, heads, channels;
  int levels, points;
  const int64_t* spatial_shapes;  // (height, width) of each level
  const void* value;              // (B, S, M, D)
  int64_t value_stride[3];        // of B, S, M
  const void* reference_points;   // (B, Q, L, 2), normalised; null: `sampling` holds locations, `attention` weights
  int64_t reference_stride[2];    // of B (0 where all pictures share them), Q
  const void* sampling;           // (B, Q, M, L, P, 2): offsets in cells, or normalised locations
  int64_t sampling_stride[3];     // of B, Q, M
  const void* attention;          // (B, Q, M, L, P): logits, or weights
  int64_t attention_stride[3];    // of B, Q, M
};

}  // namespace cpu
}  // namespace mask2former
