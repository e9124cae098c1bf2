// The schemas of operators for what an encoder layer does with each position by itself. Their kernels are in cpu/; the
// plain form of each, and what makes them differentiable, is in ../../modeling/pixel_decoder/position_wise.py.
//
// B pictures, S positions, C channels, F hidden features. Backward operators return the gradients that are needed, in
// the order of `needed`.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mask2former, m) {
  // x (B, S, C), position (B or 1, S, C) -> what the first layer makes of x, and the others of x + position
  m.def("project_positions(Tensor x, Tensor position, Tensor[] weights, Tensor[] biases) -> Tensor[]");
  // grads: of all results; needed: x, position, weights, biases
  m.def(
      "project_positions_backward(Tensor[] grads, Tensor x, Tensor position, Tensor[] weights, bool[] needed)"
      " -> Tensor[]");
  // x, attended (B, S, C); weight and bias of the output layer (C, C), the first norm (C), the two layers of the
  // feed-forward network (F, C) and (C, F), and the second norm (C) -> (B, S, C); and with_sums what both norms took,
  // for the backward pass
  m.def(
      "add_and_feed_forward(Tensor x, Tensor attended, Tensor[] parameters, float eps1, float eps2, bool with_sums)"
      " -> Tensor[]");
  // needed: x, attended, parameters
  m.def(
      "add_and_feed_forward_backward(Tensor grad, Tensor sum1, Tensor sum2, Tensor attended, Tensor[] parameters, "
      "float eps1, float eps2, bool[] needed) -> Tensor[]");
}
