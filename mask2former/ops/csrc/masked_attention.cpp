// The schemas of operators for attention with a mask that all heads share. Their kernels are in cpu/; the plain form is
// torch's scaled_dot_product_attention.
//
// B pictures, M heads, Q queries, S keys, D channels of a head.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mask2former, m) {
  // query (B, M, Q, D), key, value (B, M, S, D), bias (B or 1, 1, Q, S) -> what queries attend to (B, M, Q, D), and the
  // logarithms (B, M, Q) of the sums that their weights were divided by
  m.def("masked_attention(Tensor query, Tensor key, Tensor value, Tensor bias) -> (Tensor, Tensor)");
  // with the gradient of the first and both of these -> gradients of query, key and value
  m.def(
      "masked_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor bias, Tensor output, "
      "Tensor log_sums) -> (Tensor, Tensor, Tensor)");
}
