// The schemas of operators for 3x3 convolutions of float32 maps with stride 1 and zero padding of 1. Their kernels are
// in cpu/; the plain form is torch's own convolution.
//
// B pictures, C channels in, K channels out, H and W the size of a map.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mask2former, m) {
  // x (B, C, H, W), weight (K, C, 3, 3), bias (K) -> (B, K, H, W), channels last
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  // grad (B, K, H, W), weight (K, C, 3, 3) -> gradient of x (B, C, H, W), channels last
  m.def("conv3x3_backward_input(Tensor grad, Tensor weight) -> Tensor");
  // grad (B, K, H, W), x (B, C, H, W) -> gradient of weight (K, C, 3, 3)
  m.def("conv3x3_backward_weight(Tensor grad, Tensor x) -> Tensor");
}
