// What a CPU kernel works on: plain pointers and sizes, so that a kernel's file needs no header of torch.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../ms_deform_attn.h"

namespace mask2former {
namespace cpu {

// B batch, S positions of all levels together, Q queries, M heads, D channels of a head, L levels, P points.
// Strides count elements. value's D, and the (L, P, 2) or (L, P) of the sampling tensors, are contiguous.
struct Problem {
  Type value_type;     // of value, output, grad_output and grad_value
  Type sampling_type;  // of sampling and attention and their gradients: value_type, or float32
  int64_t batch, positions, queries, heads, channels;
  int64_t levels, points;
  const int64_t* spatial_shapes;  // (height, width) of each level
  const void* value;              // (B, S, M, D)
  int64_t value_stride[3];        // of B, S, M
  const void* reference_points;   // (B, Q, L, 2) in float64 or float32, normalised; null: see below
  int64_t reference_stride[2];    // of B (0 where all pictures share them), Q
  const void* sampling;           // (B, Q, M, L, P, 2): offsets in cells; without reference points, locations
  int64_t sampling_stride[3];     // of B, Q, M
  const void* attention;          // (B, Q, M, L, P): logits; without reference points, weights
  int64_t attention_stride[3];    // of B, Q, M
};

// The part of a backward pass that one task does: it owns these heads and levels of grad_value in picture `batch`.
struct BackwardTask {
  const void* grad_output;   // (B, Q, M, D), contiguous
  void* sums;                // where grad_value's picture is summed up, in float64 or float32
  int64_t sums_stride[2];    // of S, M
  void* grad_sampling;       // (B, Q, M, L, P, 2), contiguous
  void* grad_attention;      // (B, Q, M, L, P), contiguous
  int64_t batch, first_head, last_head, first_level, last_level;  // last: one behind
};

// Functions of one capability. `workspace` has workspace_size() bytes, aligned to 64, and belongs to one thread.
struct Kernels {
  size_t (*workspace_size)(const Problem&);
  // Rows [first, last) of output (B*Q, M*D).
  void (*forward)(const Problem&, void* output, int64_t first, int64_t last, void* workspace);
  // Where a task has all levels, grad_attention is finished; else it holds gradients of normalised weights.
  void (*backward)(const Problem&, const BackwardTask&, void* workspace);
  // Softmax's part of the gradient in place, for rows [first, last) of (B*Q).
  void (*softmax_backward)(const Problem&, void* grad_attention, int64_t first, int64_t last, void* workspace);
  // One head's sums (S, D) in float32, positions [first, last), rounded into grad_value (B, S, M, D).
  void (*round_sums)(const Problem&, const void* sums, void* grad_value, int64_t batch, int64_t head, int64_t first,
                     int64_t last);
};

const Kernels& kernels_default();
#if defined(__GNUC__) && defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

}  // namespace cpu
}  // namespace mask2former
