// Kernels for position-wise layers, for one CPU capability, in its own namespace: see kernels.inc.h.

// Calls function(0, c) for columns c, which takes as many at a time as its first argument has numbers.
template <typename Function>
MASK2FORMER_INLINE void for_columns(int64_t columns, Function function) {
  constexpr int WIDTH = width_of<float>();
  int64_t c = 0;
  for (; c + WIDTH <= columns; c += WIDTH) function(Vector<float>{}, c);
  for (; c < columns; ++c) function(0.0f, c);
}

// A sum over columns, of as many side by side as a vector has.
struct RowSum {
  Vector<float> vectors{};
  float rest = 0.0f;
};
MASK2FORMER_INLINE void add_to(RowSum& sum, Vector<float> numbers) { sum.vectors += numbers; }
MASK2FORMER_INLINE void add_to(RowSum& sum, float number) { sum.rest += number; }
MASK2FORMER_INLINE float total_of(const RowSum& sum) {
  float total = 0.0f;
  for (int i = 0; i < width_of<float>(); ++i) total += sum.vectors[i];
  return total + sum.rest;
}

// Adds numbers, or a vector of them, to those in memory.
template <typename Number>
MASK2FORMER_INLINE void add_to(float* to, Number numbers) {
  store(to, load<Number>(to) + numbers);
}

void add_bias(float* x, const float* bias, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, x += columns)
    for_columns(columns, [&](auto zero, int64_t c) { add_to(x + c, load<decltype(zero)>(bias + c)); });
}

void add_bias_and_relu(float* x, const float* bias, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, x += columns)
    for_columns(columns, [&](auto zero, int64_t c) {
      const auto sum = load<decltype(zero)>(x + c) + load<decltype(zero)>(bias + c);
      store(x + c, sum < 0.0f ? zero : sum);  // so that NaN stays
    });
}

// Of a row: its mean, and what its deviation is multiplied with.
struct Scaling {
  float mean, scale;
};

// Mean first, and then the deviation from it, while the row is in the first cache.
MASK2FORMER_INLINE Scaling scaling_of(const float* row, float eps, int64_t columns) {
  const float share = 1.0f / float(columns);
  RowSum sum, squares;
  for_columns(columns, [&](auto zero, int64_t c) { add_to(sum, load<decltype(zero)>(row + c)); });
  const float mean = total_of(sum) * share;
  for_columns(columns, [&](auto zero, int64_t c) {
    const auto deviation = load<decltype(zero)>(row + c) - mean;
    add_to(squares, deviation * deviation);
  });
  return {mean, 1.0f / __builtin_sqrtf(total_of(squares) * share + eps)};
}

MASK2FORMER_INLINE void norm_row(const float* row, const Norm& norm, float* normed, int64_t columns) {
  const Scaling scaling = scaling_of(row, norm.eps, columns);
  for_columns(columns, [&](auto zero, int64_t c) {
    using Number = decltype(zero);
    store(normed + c, (load<Number>(row + c) - scaling.mean) * scaling.scale * load<Number>(norm.weight + c) +
                          load<Number>(norm.bias + c));
  });
}

void layer_norm(const float* x, const Norm& norm, float* normed, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, x += columns, normed += columns) norm_row(x, norm, normed, columns);
}

void add_and_norm(float* x, const float* residual, const float* bias, const Norm& norm, float* normed, int64_t rows,
                  int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, x += columns, residual += columns, normed += columns) {
    for_columns(columns, [&](auto zero, int64_t c) {
      add_to(x + c, load<decltype(zero)>(residual + c) + load<decltype(zero)>(bias + c));
    });
    norm_row(x, norm, normed, columns);
  }
}

void add_rows(const float* x, float* sums, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, x += columns)
    for_columns(columns, [&](auto zero, int64_t c) { add_to(sums + c, load<decltype(zero)>(x + c)); });
}

void relu_backward(float* grad, const float* features, float* sums, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, grad += columns, features += columns)
    for_columns(columns, [&](auto zero, int64_t c) {
      using Number = decltype(zero);
      const Number passed = load<Number>(features + c) <= 0.0f ? zero : load<Number>(grad + c);
      store(grad + c, passed);
      add_to(sums + c, passed);
    });
}

// The gradient of a row without what its mean and deviation take away: its mean, and its projection on the normed row.
void norm_backward(const float* grad, const float* x, const Norm& norm, float* grad_x, const NormSums& sums,
                   int64_t rows, int64_t columns) {
  const float share = 1.0f / float(columns);
  for (int64_t row = 0; row < rows; ++row, grad += columns, x += columns, grad_x += columns) {
    const Scaling scaling = scaling_of(x, norm.eps, columns);
    RowSum sum, projection;
    for_columns(columns, [&](auto zero, int64_t c) {
      using Number = decltype(zero);
      const Number incoming = load<Number>(grad + c);
      const Number normed = (load<Number>(x + c) - scaling.mean) * scaling.scale;
      const Number weighted = incoming * load<Number>(norm.weight + c);
      add_to(sums.weight + c, incoming * normed);
      add_to(sums.bias + c, incoming);
      add_to(sum, weighted);
      add_to(projection, weighted * normed);
    });
    const float mean = total_of(sum) * share, along = total_of(projection) * share;
    for_columns(columns, [&](auto zero, int64_t c) {
      using Number = decltype(zero);
      const Number normed = (load<Number>(x + c) - scaling.mean) * scaling.scale;
      const Number weighted = load<Number>(grad + c) * load<Number>(norm.weight + c);
      const Number outgoing = (weighted - mean - normed * along) * scaling.scale;
      store(grad_x + c, outgoing);
      add_to(sums.grad + c, outgoing);
    });
  }
}

constexpr PositionWiseKernels POSITION_WISE_KERNELS{add_bias, add_bias_and_relu, add_and_norm, layer_norm,
                                                    add_rows, relu_backward,     norm_backward};
