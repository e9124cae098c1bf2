// The schemas of operators for masks at points. Their kernels are in cpu/, the plain form of each in ../points.py.
// Gradients are the callers'.
//
// N maps, H and W their size; R rows of points, P points of each.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mask2former, m) {
  // Uniform numbers in [-1, 1) of the sequence that a seed names, the same for any number of threads.
  m.def("random_points(int[] shape, int seed) -> Tensor");
  // maps (N, H, W) float32 or bool, points (R, P, 2), index (R) of the maps, or none if R is N -> (R, P)
  m.def("sample_points(Tensor maps, Tensor points, Tensor? index) -> Tensor");
  // values (N, P), points (N, P, 2); maps (N, H, W) become the gradient of those whose values at points have this one
  m.def("spread_points(Tensor values, Tensor points, Tensor(a!) maps) -> ()");
  // maps (N, H, W) float32; writes points (N, P, 2), those of `drawn` random points of each map where it is nearest to
  // zero, and its values (N, P) there
  m.def("draw_nearest_to_zero(Tensor maps, int drawn, int seed, Tensor(a!) points, Tensor(b!) values) -> ()");
  // logits (N, P), labels (N, P) -> sums over P (N, 4) of cross-entropy, probability, label and probability times label
  m.def("loss_sums(Tensor logits, Tensor labels) -> Tensor");
  // grad (N, 4) of these sums -> that of logits (N, P)
  m.def("loss_sums_backward(Tensor grad, Tensor logits, Tensor labels) -> Tensor");
  // Makes logits (N, P) probabilities -> sums over P (N, 2) of the logits' softplus and of probability
  m.def("to_probabilities(Tensor(a!) logits) -> Tensor");
}
