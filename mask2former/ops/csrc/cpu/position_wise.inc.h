// Kernels for position-wise layers, for one CPU capability, in its own namespace: see kernels.inc.h.

void add_bias(float* x, const float* bias, int64_t rows, int64_t columns) {
  constexpr int WIDTH = width_of<float>();
  for (int64_t row = 0; row < rows; ++row, x += columns) {
    int64_t c = 0;
    for (; c + WIDTH <= columns; c += WIDTH)
      store(x + c, load<Vector<float>>(x + c) + load<Vector<float>>(bias + c));
    for (; c < columns; ++c) x[c] += bias[c];
  }
}

void add_bias_and_relu(float* x, const float* bias, int64_t rows, int64_t columns) {
  constexpr int WIDTH = width_of<float>();
  for (int64_t row = 0; row < rows; ++row, x += columns) {
    int64_t c = 0;
    for (; c + WIDTH <= columns; c += WIDTH) {
      const Vector<float> sum = load<Vector<float>>(x + c) + load<Vector<float>>(bias + c);
      store(x + c, sum < 0.0f ? Vector<float>{} : sum);  // so that NaN stays
    }
    for (; c < columns; ++c) {
      const float sum = x[c] + bias[c];
      x[c] = sum < 0.0f ? 0.0f : sum;
    }
  }
}

MASK2FORMER_INLINE float sum_of(Vector<float> numbers) {
  float sum = 0.0f;
  for (int i = 0; i < width_of<float>(); ++i) sum += numbers[i];
  return sum;
}

// Mean first, and then the deviation from it, while the row is in the first cache.
void add_and_norm(float* x, const float* residual, const float* bias, const Norm& norm, int64_t rows, int64_t columns) {
  constexpr int WIDTH = width_of<float>();
  const float share = 1.0f / float(columns);
  for (int64_t row = 0; row < rows; ++row, x += columns, residual += columns) {
    Vector<float> sums{}, squares{};
    float rest = 0.0f, rest_of_squares = 0.0f;
    int64_t c = 0;
    for (; c + WIDTH <= columns; c += WIDTH) {
      const Vector<float> sum =
          load<Vector<float>>(x + c) + (load<Vector<float>>(residual + c) + load<Vector<float>>(bias + c));
      store(x + c, sum);
      sums += sum;
    }
    for (; c < columns; ++c) rest += x[c] += residual[c] + bias[c];
    const float mean = (sum_of(sums) + rest) * share;
    for (c = 0; c + WIDTH <= columns; c += WIDTH) {
      const Vector<float> deviation = load<Vector<float>>(x + c) - mean;
      squares += deviation * deviation;
    }
    for (; c < columns; ++c) rest_of_squares += (x[c] - mean) * (x[c] - mean);
    const float scale = 1.0f / __builtin_sqrtf((sum_of(squares) + rest_of_squares) * share + norm.eps);
    for (c = 0; c + WIDTH <= columns; c += WIDTH)
      store(x + c, (load<Vector<float>>(x + c) - mean) * scale * load<Vector<float>>(norm.weight + c) +
                       load<Vector<float>>(norm.bias + c));
    for (; c < columns; ++c) x[c] = (x[c] - mean) * scale * norm.weight[c] + norm.bias[c];
  }
}

constexpr PositionWiseKernels POSITION_WISE_KERNELS{add_bias, add_bias_and_relu, add_and_norm};
