// Kernels for masked attention, for one CPU capability, in its own namespace: see kernels.inc.h.

constexpr float LOWEST = -__builtin_inff();

// Calls function(numbers, at) for a row's vectors; the last one may be filled up with `padding`.
template <typename Function>
MASK2FORMER_INLINE void for_row(float* row, int64_t columns, float padding, Function function) {
  constexpr int WIDTH = width_of<float>();
  int64_t c = 0;
  for (; c + WIDTH <= columns; c += WIDTH) {
    Vector<float> numbers = load<Vector<float>>(row + c);
    function(numbers, c, WIDTH);
    store(row + c, numbers);
  }
  if (c == columns) return;
  Vector<float> numbers = Vector<float>{} + padding;
  __builtin_memcpy(&numbers, row + c, size_t(columns - c) * sizeof(float));
  function(numbers, c, columns - c);
  __builtin_memcpy(row + c, &numbers, size_t(columns - c) * sizeof(float));
}

// `count` numbers, filled up with 0.
MASK2FORMER_INLINE Vector<float> load_some(const float* from, int64_t count) {
  if (count == width_of<float>()) return load<Vector<float>>(from);
  Vector<float> numbers{};
  __builtin_memcpy(&numbers, from, size_t(count) * sizeof(float));
  return numbers;
}

void add_weights(float* logits, const AttentionBias& bias, int64_t rows, int64_t columns, float* largest, float* sums,
                 float* values, int64_t channels) {
  for (int64_t row = 0; row < rows; ++row, logits += columns, values += channels) {
    const float* const here = bias.data + row * bias.stride;
    Vector<float> highest = Vector<float>{} + LOWEST;
    for_row(logits, columns, LOWEST, [&](Vector<float>& numbers, int64_t c, int64_t count) {
      numbers += load_some(here + c, count);
      highest = numbers > highest || numbers != numbers ? numbers : highest;  // NaN stays
    });
    float top = largest[row];
    for (int i = 0; i < width_of<float>(); ++i) top = highest[i] > top || highest[i] != highest[i] ? highest[i] : top;
    if (top == LOWEST) {  // nothing to attend to until here
      for (int64_t c = 0; c < columns; ++c) logits[c] = 0.0f;
      continue;
    }
    Vector<float> total{};
    for_row(logits, columns, LOWEST, [&](Vector<float>& numbers, int64_t, int64_t) {
      numbers = exp_of_negative(numbers - top);
      total += numbers;
    });
    float sum = 0.0f;
    for (int i = 0; i < width_of<float>(); ++i) sum += total[i];
    if (top == largest[row]) {
      sums[row] += sum;
      continue;
    }
    const float factor = largest[row] == LOWEST ? 0.0f : __builtin_expf(largest[row] - top);
    sums[row] = sums[row] * factor + sum;
    for (int64_t c = 0; c < channels; ++c) values[c] *= factor;
    largest[row] = top;
  }
}

void weights_and_gradients(float* logits, float* grads, const AttentionBias& bias, int64_t rows, int64_t columns,
                           const float* log_sums, const float* means) {
  for (int64_t row = 0; row < rows; ++row, logits += columns, grads += columns) {
    const float* const here = bias.data + row * bias.stride;
    for_row(logits, columns, LOWEST, [&](Vector<float>& numbers, int64_t c, int64_t count) {
      numbers = exp_of_negative(numbers + load_some(here + c, count) - log_sums[row]);
      const Vector<float> grad = numbers * (load_some(grads + c, count) - means[row]);
      __builtin_memcpy(grads + c, &grad, size_t(count) * sizeof(float));
    });
  }
}

constexpr AttentionKernels ATTENTION_KERNELS{add_weights, weights_and_gradients};
