// The schemas of operators for what an encoder layer does with each position by itself, without gradients. Their
// kernels are in cpu/; the plain form of each is in ../../modeling/pixel_decoder/position_wise.py.
//
// B pictures, S positions, C channels, F hidden features.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mask2former, m) {
  // x (B, S, C), position (B or 1, S, C) -> what the first layer makes of x, and the others of x + position
  m.def("project_positions(Tensor x, Tensor position, Tensor[] weights, Tensor[] biases) -> Tensor[]");
  // x, attended (B, S, C); weight and bias of the output layer (C, C), the first norm (C), the two layers of the
  // feed-forward network (F, C) and (C, F), and the second norm (C) -> (B, S, C)
  m.def("add_and_feed_forward(Tensor x, Tensor attended, Tensor[] parameters, float eps1, float eps2) -> Tensor");
}
