// What kernels for masks at points work on: plain pointers and sizes, so that their file needs no header of torch.
//
// Points are (x, y) from (-1, -1), the top left corner of a map's first cell, to (1, 1), as torch's grid_sample takes
// them. A map is (height, width), contiguous, at least 2 x 2, with fewer than 2^31 cells.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace mask2former {
namespace cpu {

struct MapSize {
  int64_t height, width;
};

// Random numbers are made in blocks of this many, each with a generator of its own.
constexpr int64_t RANDOM_BLOCK = 4096;

// Functions of one capability.
struct PointKernels {
  // `count` uniform numbers in [-1, 1), at most a block: those of block `block` of the sequence that `seed` names.
  void (*uniform)(uint64_t seed, uint64_t block, int64_t count, float* numbers);
  // Bilinear values of a map at `count` points, zero outside; of a map of bools, one byte each.
  void (*sample)(const float* map, MapSize size, const float* points, int64_t count, float* values);
  void (*sample_bools)(const uint8_t* map, MapSize size, const float* points, int64_t count, float* values);
  // The gradient of a map whose values at points have the gradients `values`.
  void (*spread)(const float* values, const float* points, int64_t count, float* map, MapSize size);
  // The `kept` of `count` values nearest to zero, and their points. NaN is the farthest.
  void (*nearest_to_zero)(const float* points, const float* values, int64_t count, int64_t kept, float* kept_points,
                          float* kept_values);
  // Of logits x and labels t at `count` points, with s = sigmoid(x): the sums of cross-entropy, s, t and s t.
  void (*loss_sums)(const float* logits, const float* labels, int64_t count, float sums[4]);
  // The gradients of logits whose sums have the gradients `grad`.
  void (*loss_sums_backward)(const float grad[4], const float* logits, const float* labels, int64_t count,
                             float* gradients);
  // Makes logits x at `count` points s = sigmoid(x); the sums of softplus(x), the cross-entropy with labels of 0, and s.
  void (*to_probabilities)(float* logits, int64_t count, float sums[2]);
};

}  // namespace cpu
}  // namespace mask2former
