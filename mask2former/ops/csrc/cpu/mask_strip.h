// What the CPU kernels for results of masks work on: plain pointers and sizes, as in kernel.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace mask2former {
namespace cpu {

// N masks in R rows and W columns, still to be made: each row is a mixture of two of the rows that there are.
struct MaskStrip {
  int64_t masks, rows, columns;
  const float* maps;                // (N, r, W) logits, W contiguous
  int64_t mask_stride, row_stride;  // of maps, in elements
  const int64_t* low;               // (R) rows of maps
  const int64_t* high;              // (R)
  const float* share;               // (R) of `high`
};

// Rows [first_row, last_row) and columns [first_column, last_column) of a strip, at most TILE_COLUMNS of them.
struct Tile {
  int64_t first_row, last_row, first_column, last_column;
};
constexpr int64_t TILE_COLUMNS = 64;  // of 100 masks in float32, 25 KB: the first cache holds them

// The class probabilities of the masks, none below 0, in both orders. `of_masks` has zeros up to a whole number of
// CLASSES_PADDED classes.
struct ClassProbabilities {
  int64_t classes, padded;
  const float* of_classes;  // (K, N)
  const float* of_masks;    // (N, padded)
};
constexpr int64_t CLASSES_PADDED = 16;

// Masks that compete for pixels.
struct Rivals {
  int64_t count;
  const int64_t* masks;  // (count) which of the strip's
  const float* scores;   // (count) of their classes
  int32_t* winner;       // (R, W) the best one's number, or `count` where its probability is less than a half
  int64_t* visible;      // (count) pixels where it is the best, added to what is there
  int64_t* remaining;    // (count) of them, those where its probability is a half or more
  int64_t* whole;        // (count) pixels where its probability is a half or more
};

// Where binary masks go, and what is known of them: added to what is there.
struct BinaryMasks {
  const int64_t* copies;  // (N+1) a mask goes to places[copies[n]] to places[copies[n + 1] - 1]; without any, nowhere
  const int64_t* places;
  uint8_t* masks;         // (M, R, W), W contiguous
  int64_t mask_stride, row_stride;
  float* above_half;      // (N) sum of what probabilities exceed a half by
  int64_t* area;          // (N) pixels inside
  uint8_t* in_columns;    // (N, W) 1 where a column has a pixel inside
  uint8_t* in_rows;       // (N, R)
};

// `workspace` has workspace_size() bytes, aligned to 64, and belongs to one thread.
struct MaskKernels {
  size_t (*workspace_size)(const MaskStrip&, const ClassProbabilities&);
  // labels (R, W): the first of the best classes.
  void (*class_labels)(const MaskStrip&, const Tile&, const ClassProbabilities&, int32_t* labels, void* workspace);
  // scores (K, R, W), W contiguous, with distances in elements between classes and between rows.
  void (*class_scores)(const MaskStrip&, const Tile&, const ClassProbabilities&, float* scores, int64_t class_stride,
                       int64_t row_stride, void* workspace);
  void (*winners)(const MaskStrip&, const Tile&, const Rivals&);
  void (*binary_masks)(const MaskStrip&, const Tile&, const BinaryMasks&);
};

}  // namespace cpu
}  // namespace mask2former
