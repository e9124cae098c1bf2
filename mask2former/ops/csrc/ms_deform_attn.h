// The arithmetic of one sampling point of multi-scale deformable attention (Deformable DETR, equation 3), for the
// host's compiler and for nvcc alike, so that what the CUDA kernels compute is tested on the CPU too.
//
// No header of torch or of the C++ library is included: kernels of several CPU capabilities include this one, and an
// inline function that they shared would be linked in the version of whichever came first.
#pragma once

#if defined(__CUDACC__)
#define MASK2FORMER_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define MASK2FORMER_INLINE static __forceinline
#else
#define MASK2FORMER_INLINE static inline __attribute__((always_inline))
#endif

namespace mask2former {

enum class Type { float64, float32, bfloat16, float16 };

// Where along one axis of `size` cells a point lies: between the centres of cells `low` and `low + 1`, `fraction` of
// the way. `low_inside` and `high_inside` say which of the two cells exist.
template <typename T>
struct AxisPosition {
  int low;
  bool low_inside;
  bool high_inside;
  T fraction;
};

// `coordinate` in cells: 0 is the centre of the first cell. A point outside by more than a cell counts as outside by
// a little more than one, so that the integer never overflows; NaN stays NaN in `fraction` and reads no cell.
template <typename T>
MASK2FORMER_INLINE AxisPosition<T> axis_position(T coordinate, int size) {
  const T lowest = T(-2), highest = T(size) + T(1);
  const T clamped = coordinate < lowest ? lowest : (coordinate > highest ? highest : coordinate);
  AxisPosition<T> position;
  const bool is_number = clamped == clamped;
  const int truncated = is_number ? static_cast<int>(clamped) : -2;
  position.low = truncated - (is_number && T(truncated) > clamped ? 1 : 0);
  position.fraction = clamped - T(position.low);
  position.low_inside = position.low >= 0 && position.low < size;
  position.high_inside = position.low + 1 >= 0 && position.low + 1 < size;
  return position;
}

// Coordinate in cells of a normalised location: the first cell's outer edge is 0, the last one's is 1.
template <typename T>
MASK2FORMER_INLINE T coordinate_of_location(T location, int size) {
  return location * T(size) - T(0.5);
}

// Coordinate in cells of a normalised reference point and an offset from it in cells.
template <typename T>
MASK2FORMER_INLINE T coordinate_of_offset(T reference_point, T offset, int size) {
  return reference_point * T(size) + offset - T(0.5);
}

}  // namespace mask2former
