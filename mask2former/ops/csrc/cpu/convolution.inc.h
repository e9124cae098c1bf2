// Winograd's transforms for one CPU capability, in its own namespace: see kernels.inc.h.
//
// A convolution of 3 weights that gives 4 results takes 6 products instead of 12, F(4, 3): results are the coefficients
// of a polynomial, which its values at 6 points give, and those are products. In two dimensions 36 instead of 144.

// One dimension each, of `Numbers`, at points 0, near, -near, far, -far and infinity in that order.
template <typename Numbers>
MASK2FORMER_INLINE void input_at_points(const Numbers* x, Numbers* to) {
  constexpr float NEAR2 = NEAR_POINT * NEAR_POINT, FAR2 = FAR_POINT * FAR_POINT;
  to[0] = NEAR2 * FAR2 * x[0] - (NEAR2 + FAR2) * x[2] + x[4];
  const Numbers even = x[4] - FAR2 * x[2], odd = NEAR_POINT * (x[3] - FAR2 * x[1]);
  to[1] = even + odd;
  to[2] = even - odd;
  const Numbers far_even = x[4] - NEAR2 * x[2], far_odd = FAR_POINT * (x[3] - NEAR2 * x[1]);
  to[3] = far_even + far_odd;
  to[4] = far_even - far_odd;
  to[5] = NEAR2 * FAR2 * x[1] - (NEAR2 + FAR2) * x[3] + x[5];
}

template <typename Numbers>
MASK2FORMER_INLINE void output_from_points(const Numbers* x, Numbers* to) {
  constexpr float NEAR2 = NEAR_POINT * NEAR_POINT, FAR2 = FAR_POINT * FAR_POINT;
  const Numbers sum = x[1] + x[2], difference = NEAR_POINT * (x[1] - x[2]);
  const Numbers far_sum = x[3] + x[4], far_difference = FAR_POINT * (x[3] - x[4]);
  to[0] = x[0] + sum + far_sum;
  to[1] = difference + far_difference;
  to[2] = NEAR2 * sum + FAR2 * far_sum;
  to[3] = NEAR2 * difference + FAR2 * far_difference + x[5];
}

// The transpose of that.
template <typename Numbers>
MASK2FORMER_INLINE void gradient_at_points(const Numbers* x, Numbers* to) {
  constexpr float NEAR2 = NEAR_POINT * NEAR_POINT, FAR2 = FAR_POINT * FAR_POINT;
  to[0] = x[0];
  const Numbers even = x[0] + NEAR2 * x[2], odd = NEAR_POINT * (x[1] + NEAR2 * x[3]);
  to[1] = even + odd;
  to[2] = even - odd;
  const Numbers far_even = x[0] + FAR2 * x[2], far_odd = FAR_POINT * (x[1] + FAR2 * x[3]);
  to[3] = far_even + far_odd;
  to[4] = far_even - far_odd;
  to[5] = x[3];
}

// Calls transform(Numbers{}, first channel) for vectors of channels and then for single ones.
template <typename Function>
MASK2FORMER_INLINE void for_numbers(int64_t channels, Function transform) {
  constexpr int WIDTH = width_of<float>();
  int64_t c = 0;
  for (; c + WIDTH <= channels; c += WIDTH) transform(Vector<float>{}, c);
  for (; c < channels; ++c) transform(float{}, c);
}

// SIDE x SIDE cells from (top, left) on to frequencies; the transform goes down the columns first, then along the rows.
template <int SIDE, bool INSIDE, typename Transform>
MASK2FORMER_INLINE void cells_to_frequencies(const MapOf<const float>& map, int64_t top, int64_t left, float* to,
                                             int64_t stride, Transform transform) {
  const float* cells[SIDE][SIDE];
  for (int row = 0; row < SIDE; ++row)
    for (int column = 0; column < SIDE; ++column) {
      const int64_t y = top + row, x = left + column;
      const bool inside = INSIDE || (y >= 0 && y < map.height && x >= 0 && x < map.width);
      cells[row][column] = inside ? map.data + (y * map.width + x) * map.channels : nullptr;
    }
  for_numbers(map.channels, [&](auto zero, int64_t c) {
    using Numbers = decltype(zero);
    Numbers columns[FREQUENCIES_SIDE][FREQUENCIES_SIDE];  // of which SIDE are used in the second place
    for (int column = 0; column < SIDE; ++column) {
      Numbers from[SIDE], result[FREQUENCIES_SIDE];
      for (int row = 0; row < SIDE; ++row) {
        const float* const cell = cells[row][column];
        from[row] = INSIDE || cell ? load<Numbers>(cell + c) : zero;
      }
      transform(from, result);
      for (int row = 0; row < FREQUENCIES_SIDE; ++row) columns[row][column] = result[row];
    }
    for (int row = 0; row < FREQUENCIES_SIDE; ++row) {
      Numbers result[FREQUENCIES_SIDE];
      transform(columns[row], result);
      for (int column = 0; column < FREQUENCIES_SIDE; ++column)
        store(to + (row * FREQUENCIES_SIDE + column) * stride + c, result[column]);
    }
  });
}

template <int SIDE, typename Transform>
MASK2FORMER_INLINE void any_cells_to_frequencies(const MapOf<const float>& map, int64_t top, int64_t left, float* to,
                                                 int64_t stride, Transform transform) {
  const bool inside = top >= 0 && left >= 0 && top + SIDE <= map.height && left + SIDE <= map.width;
  if (inside)
    cells_to_frequencies<SIDE, true>(map, top, left, to, stride, transform);
  else
    cells_to_frequencies<SIDE, false>(map, top, left, to, stride, transform);
}

void transform_input(const MapOf<const float>& map, int64_t top, int64_t left, float* to, int64_t stride) {
  any_cells_to_frequencies<FREQUENCIES_SIDE>(map, top - 1, left - 1, to, stride,
                                             [](const auto* x, auto* result) { input_at_points(x, result); });
}

void transform_gradient(const MapOf<const float>& map, int64_t top, int64_t left, float* to, int64_t stride) {
  any_cells_to_frequencies<TILE_SIDE>(map, top, left, to, stride,
                                      [](const auto* x, auto* result) { gradient_at_points(x, result); });
}

void transform_output(const float* from, int64_t stride, const float* bias, const MapOf<float>& map, int64_t top,
                      int64_t left) {
  const int64_t rows = map.height - top < TILE_SIDE ? map.height - top : TILE_SIDE;
  const int64_t columns = map.width - left < TILE_SIDE ? map.width - left : TILE_SIDE;
  for_numbers(map.channels, [&](auto zero, int64_t c) {
    using Numbers = decltype(zero);
    Numbers half[TILE_SIDE][FREQUENCIES_SIDE];
    for (int column = 0; column < FREQUENCIES_SIDE; ++column) {
      Numbers numbers[FREQUENCIES_SIDE], result[TILE_SIDE];
      for (int row = 0; row < FREQUENCIES_SIDE; ++row)
        numbers[row] = load<Numbers>(from + (row * FREQUENCIES_SIDE + column) * stride + c);
      output_from_points(numbers, result);
      for (int row = 0; row < TILE_SIDE; ++row) half[row][column] = result[row];
    }
    const Numbers shift = bias ? load<Numbers>(bias + c) : zero;
    for (int64_t row = 0; row < rows; ++row) {
      Numbers result[TILE_SIDE];
      output_from_points(half[row], result);
      float* const to = map.data + ((top + row) * map.width + left) * map.channels + c;
      for (int64_t column = 0; column < columns; ++column) store(to + column * map.channels, result[column] + shift);
    }
  });
}

constexpr ConvolutionKernels CONVOLUTION_KERNELS{transform_input, transform_output, transform_gradient};
