// Schemas of deformable attention. Kernels are in cpu/ and cuda/; fake functions and autograd are in ../registration.py.
//
// B batch, S positions of all levels together, Q queries, M heads, D channels of a head, L levels, P points.
// spatial_shapes is (height, width) of each level in a row: 2 L integers.
#include <torch/library.h>

TORCH_LIBRARY(mask2former, m) {
  // value (B, S, M, D), sampling_locations (B, Q, M, L, P, 2), attention_weights (B, Q, M, L, P) -> (B, Q, M*D)
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
      " -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,"
      " Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
  // The same with locations and weights still to be made: reference_points (B or 1, Q, L, 2) normalised (x, y),
  // sampling_offsets (B, Q, M, L, P, 2) in cells, attention_logits (B, Q, M, L, P), softmax over L and P.
  m.def(
      "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor reference_points, Tensor sampling_offsets,"
      " Tensor attention_logits) -> Tensor");
  // -> gradients of value, sampling_offsets and attention_logits
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes,"
      " Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits) -> (Tensor, Tensor, Tensor)");
}
