// The schemas of operators that make results of masks. Their kernels are in cpu/; the plain form of each, and what it
// computes, is in ../mask_strip.py. Nothing has gradients.
//
// N masks, K classes, M instances; R rows and W columns of a strip. A strip is `maps` (N, r, W) and, for each of its
// rows, the rows `low` and `high` (R) of maps, and the `share` (R) of the second.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mask2former, m) {
  // class_probabilities (K, N) -> labels (R, W) int32
  m.def("class_labels(Tensor maps, Tensor low, Tensor high, Tensor share, Tensor class_probabilities) -> Tensor");
  // scores (K, R, W)
  m.def(
      "class_scores(Tensor maps, Tensor low, Tensor high, Tensor share, Tensor class_probabilities, Tensor(a!) scores)"
      " -> ()");
  // rivals (C) masks and scores (C) -> winner (R, W) int32; visible, remaining, whole (C) int64
  m.def(
      "mask_winners(Tensor maps, Tensor low, Tensor high, Tensor share, Tensor rivals, Tensor scores)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  // places (M) masks; binary (M, R, W) bool -> above_half (N), area (N) int64, in_columns (N, W) and in_rows (N, R)
  // bool
  m.def(
      "binary_masks(Tensor maps, Tensor low, Tensor high, Tensor share, Tensor places, Tensor(a!) binary)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}
