// What a CPU kernel works on: plain pointers and sizes, so that a kernel's file needs no header of torch.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../ms_deform_attn.h"
#include "convolution.h"
#include "mask_strip.h"
#include "masked_attention.h"
#include "points.h"
#include "position_wise.h"
#include "products.h"

namespace mask2former {
namespace cpu {

// B batch, S positions of all levels together, Q queries, M heads, D channels of a head, L levels, P points.
// Strides count elements. value's D, and the (L, P, 2) or (L, P) of the sampling tensors, are contiguous.
struct Problem {
  Type value_type;  // of value and output and their gradients; all others are float64 where it is, else float32
  int64_t batch, positions, queries, heads, channels;
  int64_t levels, points;
  const int64_t* spatial_shapes;  // (height, width) of each level
  const void* value;              // (B, S, M, D)
  int64_t value_stride[3];        // of B, S, M
  const void* reference_points;   // (B, Q, L, 2), normalised; null: see below
  int64_t reference_stride[2];    // of B (0 where all pictures share them), Q
  const void* sampling;           // (B, Q, M, L, P, 2): offsets in cells; without reference points, locations
  int64_t sampling_stride[3];     // of B, Q, M
  const void* attention;          // (B, Q, M, L, P): logits; without reference points, weights
  int64_t attention_stride[3];    // of B, Q, M
};

// All contiguous.
struct Gradients {
  const void* output;  // (B, Q, M, D)
  void* value;         // (B, S, M, D)
  void* sampling;      // (B, Q, M, L, P, 2)
  void* attention;     // (B, Q, M, L, P)
};

// The part of grad_value that is summed up at a time: positions [first, last) of one head of one picture.
struct Strip {
  int64_t batch, head, first, last;
  void* sums;  // memory for (last - first, D) in float64 where the value is, else float32
};

// Functions of one capability. `workspace` has workspace_size() bytes, aligned to 64, and belongs to one thread. Rows
// are those of (B*Q).
struct Kernels {
  size_t (*workspace_size)(const Problem&);
  // Rows [first, last) of output (B, Q, M*D).
  void (*forward)(const Problem&, void* output, int64_t first, int64_t last, void* workspace);
  // The backward pass is three functions. The first writes coordinates of samples and attention weights of rows
  // [first, last) where their gradients will be.
  void (*place_samples)(const Problem&, const Gradients&, int64_t first, int64_t last, void* workspace);
  // Then, the gradient of value. Goes over the queries in order: a cell's sum is the same whatever the strips.
  void (*value_backward)(const Problem&, const Gradients&, const Strip&, void* workspace);
  // At last, the gradients of sampling and attention of rows [first, last).
  void (*sampling_backward)(const Problem&, const Gradients&, int64_t first, int64_t last, void* workspace);
  AttentionKernels attention;
  ConvolutionKernels convolution;
  MaskKernels masks;
  PointKernels points;
  PositionWiseKernels position_wise;
  ProductKernels products;
};

// Those of the best capability that CPU and torch have.
const Kernels& kernels();

// Whether the kernel for products of matrices is faster than torch's products of large ones, too: where there is one,
// it is faster with those that fit into a thread's cache.
bool has_faster_products();

const Kernels& kernels_default();
#if defined(__GNUC__) && defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

}  // namespace cpu
}  // namespace mask2former
