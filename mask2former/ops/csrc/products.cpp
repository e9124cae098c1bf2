// The schema of the operator for products of matrices. Its kernel is in cpu/; the plain form is torch's mm and addmm.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mask2former, m) {
  // a (M, K) times b (K, N), written to `to` (M, N), or added to what is there
  m.def("multiply(Tensor a, Tensor b, Tensor(c!) to, bool add) -> ()");
}
