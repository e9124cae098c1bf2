// Winograd's transforms for 3x3 convolutions: kernels for a tile of 4x4 results and all channels.
#pragma once

#include <stdint.h>

namespace mask2former {
namespace cpu {

// Results of a tile in each direction, and numbers that they are made of.
constexpr int64_t TILE_SIDE = 4;
constexpr int64_t FREQUENCIES_SIDE = 6;
constexpr int64_t FREQUENCIES = FREQUENCIES_SIDE * FREQUENCIES_SIDE;

// Where polynomials are evaluated besides 0 and infinity: at these and their negatives. Rounding errors of float32 are
// half of those with 1 and 2, as are mostly taken.
constexpr float NEAR_POINT = 0.75f;
constexpr float FAR_POINT = 1.5f;

// A map (H, W, C), contiguous; `data` belongs to whoever made it.
template <typename T>
struct MapOf {
  T* data;
  int64_t height, width, channels;
};

struct ConvolutionKernels {
  // What a tile's results are made of: 6x6 cells from one above and left of (top, left) on, zero outside of the map, to
  // rows (C) of `to` that are `stride` apart.
  void (*transform_input)(const MapOf<const float>&, int64_t top, int64_t left, float* to, int64_t stride);
  // Results of the tile at (top, left), as far as they are in the map, of such rows, plus bias (C) if there is one.
  void (*transform_output)(const float* from, int64_t stride, const float* bias, const MapOf<float>&, int64_t top,
                           int64_t left);
  // The gradient of what `transform_output` takes, of the map's gradient.
  void (*transform_gradient)(const MapOf<const float>&, int64_t top, int64_t left, float* to, int64_t stride);
};

}  // namespace cpu
}  // namespace mask2former
