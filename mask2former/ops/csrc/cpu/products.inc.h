// Kernels for products of matrices, for AVX512, in its namespace: see kernels.inc.h.
//
// A tile of the product is summed up in registers, along a panel of b that the first cache holds; the panels of some
// rows and columns of b are in the second one (Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", ACM TOMS 2008).

constexpr int PANEL_VECTORS = 2;
constexpr int PANEL_COLUMNS = PANEL_VECTORS * width_of<float>();
constexpr int PANEL_ROWS = 12;  // 24 of 32 registers hold sums

// Sums of as many products are added up: rounding errors of longer sums are larger.
constexpr int64_t DEPTH_AT_A_TIME = 128;
constexpr int64_t COLUMNS_AT_A_TIME = 512;
constexpr int64_t ROWS_AT_A_TIME = 252;
static_assert(COLUMNS_AT_A_TIME % PANEL_COLUMNS == 0 && ROWS_AT_A_TIME % PANEL_ROWS == 0, "tiles must fit");

// A panel (depth, WIDTH) of `count` lines that are `step` apart, with numbers that are `depth_step` apart; others are 0.
template <int WIDTH>
void pack(const float* from, int64_t step, int64_t depth_step, int64_t count, int64_t depth, float* to) {
  if (count < WIDTH) __builtin_memset(to, 0, size_t(depth * WIDTH) * sizeof(float));
  if (step == 1 && count == WIDTH) {
    for (int64_t k = 0; k < depth; ++k) __builtin_memcpy(to + k * WIDTH, from + k * depth_step, WIDTH * sizeof(float));
    return;
  }
  for (int64_t line = 0; line < count; ++line)
    for (int64_t k = 0; k < depth; ++k) to[k * WIDTH + line] = from[line * step + k * depth_step];
}

// A tile's columns in VECTORS vectors. The numbers of a row of `a` are side by side, or, if PACKED, those of a column.
template <int VECTORS, bool PACKED>
MASK2FORMER_INLINE void multiply_tile(const float* a, int64_t row_stride, const float* panel, int64_t depth, bool add,
                                      float* to, int64_t stride) {
  constexpr int WIDTH = width_of<float>();
  Vector<float> sums[PANEL_ROWS][VECTORS];
  for (auto& row : sums)
    for (auto& sum : row) sum = Vector<float>{};
  for (int64_t k = 0; k < depth; ++k, panel += PANEL_COLUMNS) {
    Vector<float> b[VECTORS];
    for (int i = 0; i < VECTORS; ++i) b[i] = load<Vector<float>>(panel + i * WIDTH);
#pragma GCC unroll 12
    for (int row = 0; row < PANEL_ROWS; ++row) {
      const float number = PACKED ? a[k * PANEL_ROWS + row] : a[row * row_stride + k];
      for (int i = 0; i < VECTORS; ++i) sums[row][i] += number * b[i];
    }
  }
  for (int row = 0; row < PANEL_ROWS; ++row)
    for (int i = 0; i < VECTORS; ++i) {
      float* const place = to + row * stride + i * WIDTH;
      store(place, add ? load<Vector<float>>(place) + sums[row][i] : sums[row][i]);
    }
}

// Of a product: a tile's rows of a, a panel of b, and where the tile goes.
struct ProductTile {
  const float* a;
  bool packed;
  int64_t row_stride;
  const float* panel;
  int64_t depth, rows, columns;
  bool add;
  float* to;
  int64_t stride;
};

template <bool PACKED>
void multiply_tile(const ProductTile& tile, float* to, int64_t stride, bool add) {
  if (tile.columns <= width_of<float>())
    multiply_tile<1, PACKED>(tile.a, tile.row_stride, tile.panel, tile.depth, add, to, stride);
  else
    multiply_tile<PANEL_VECTORS, PACKED>(tile.a, tile.row_stride, tile.panel, tile.depth, add, to, stride);
}

void multiply_tile(const ProductTile& tile) {
  const auto function = tile.packed ? multiply_tile<true> : multiply_tile<false>;
  const bool fits = tile.rows == PANEL_ROWS && (tile.columns == PANEL_COLUMNS || tile.columns == width_of<float>());
  if (fits) return function(tile, tile.to, tile.stride, tile.add);
  float whole[PANEL_ROWS * PANEL_COLUMNS];
  function(tile, whole, PANEL_COLUMNS, false);
  for (int64_t row = 0; row < tile.rows; ++row)
    for (int64_t c = 0; c < tile.columns; ++c) {
      float& number = tile.to[row * tile.stride + c];
      number = whole[row * PANEL_COLUMNS + c] + (tile.add ? number : 0.0f);
    }
}

MASK2FORMER_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows [row, row + rows) of a and the panels of b from (k, column) on.
void multiply_rows(const Matrix& a, int64_t row, int64_t rows, int64_t k, int64_t depth, const float* panels,
                   int64_t columns, bool add, float* to, int64_t stride, float* packed_rows) {
  const bool side_by_side = a.column_stride == 1;
  const auto rows_of_a = [&](int64_t r) { return a.data + (row + r) * a.row_stride + k * a.column_stride; };
  const auto is_packed = [&](int64_t r) { return !side_by_side || rows - r < PANEL_ROWS; };
  for (int64_t r = 0; r < rows; r += PANEL_ROWS)
    if (is_packed(r))
      pack<PANEL_ROWS>(rows_of_a(r), a.row_stride, a.column_stride, least(PANEL_ROWS, rows - r), depth,
                       packed_rows + r * depth);
  for (int64_t c = 0; c < columns; c += PANEL_COLUMNS)
    for (int64_t r = 0; r < rows; r += PANEL_ROWS)
      multiply_tile({is_packed(r) ? packed_rows + r * depth : rows_of_a(r), is_packed(r), a.row_stride,
                     panels + c * depth, depth, least(PANEL_ROWS, rows - r), least(PANEL_COLUMNS, columns - c), add,
                     to + r * stride + c, stride});
}

void multiply(const Matrix& a, const Matrix& b, bool add, float* to, int64_t stride, float* workspace) {
  float* const panels = workspace;
  float* const packed_rows = panels + DEPTH_AT_A_TIME * COLUMNS_AT_A_TIME;
  if (a.columns == 0 && !add)
    for (int64_t row = 0; row < a.rows; ++row)
      __builtin_memset(to + row * stride, 0, size_t(b.columns) * sizeof(float));
  for (int64_t column = 0; column < b.columns; column += COLUMNS_AT_A_TIME) {
    const int64_t columns = least(COLUMNS_AT_A_TIME, b.columns - column);
    for (int64_t k = 0; k < a.columns; k += DEPTH_AT_A_TIME) {
      const int64_t depth = least(DEPTH_AT_A_TIME, a.columns - k);
      for (int64_t c = 0; c < columns; c += PANEL_COLUMNS)
        pack<PANEL_COLUMNS>(b.data + k * b.row_stride + (column + c) * b.column_stride, b.column_stride, b.row_stride,
                            least(PANEL_COLUMNS, columns - c), depth, panels + c * depth);
      for (int64_t row = 0; row < a.rows; row += ROWS_AT_A_TIME)
        multiply_rows(a, row, least(ROWS_AT_A_TIME, a.rows - row), k, depth, panels, columns, add || k > 0,
                      to + row * stride + column, stride, packed_rows);
    }
  }
}

constexpr ProductKernels PRODUCT_KERNELS{DEPTH_AT_A_TIME * (COLUMNS_AT_A_TIME + ROWS_AT_A_TIME), multiply};
