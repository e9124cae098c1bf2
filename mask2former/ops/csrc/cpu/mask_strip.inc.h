// Kernels for results of masks, for one CPU capability, in its own namespace: see kernels.inc.h. Letters are those of
// mask_strip.h.

constexpr int TILE_VECTORS = TILE_COLUMNS / width_of<float>();

// Logits of one mask in one row of a tile. Columns behind the tile's last get one whose probability is 0.
MASK2FORMER_INLINE void load_logits(const MaskStrip& strip, const Tile& tile, int64_t mask, int64_t row,
                                    Vector<float>* logits) {
  const float* map = strip.maps + mask * strip.mask_stride + tile.first_column;
  const float* low = map + strip.low[row] * strip.row_stride;
  const float* high = map + strip.high[row] * strip.row_stride;
  const float share = strip.share[row];
  const int64_t columns = tile.last_column - tile.first_column;
  if (columns == TILE_COLUMNS) {
    for (int v = 0; v < TILE_VECTORS; ++v) {
      const Vector<float> from = load<Vector<float>>(low + v * width_of<float>());
      logits[v] = from + share * (load<Vector<float>>(high + v * width_of<float>()) - from);
    }
    return;
  }
  alignas(64) float numbers[TILE_COLUMNS];
  for (int64_t x = 0; x < TILE_COLUMNS; ++x)
    numbers[x] = x < columns ? low[x] + share * (high[x] - low[x]) : -1e30f;
  for (int v = 0; v < TILE_VECTORS; ++v) logits[v] = load<Vector<float>>(numbers + v * width_of<float>());
}

MASK2FORMER_INLINE Vector<float> probability_of(Vector<float> logit) {
  const Vector<float> power = exp_of_negative(logit > 0.0f ? -logit : logit);
  return (logit > 0.0f ? Vector<float>{} + 1.0f : power) / (power + 1.0f);
}

// ------------------------------------------------------------------------------------------- classes

// How many vectors of pixels and how many classes a product goes over at a time: as many sums as registers hold.
constexpr int PRODUCT_VECTORS = MASK2FORMER_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int PRODUCT_CLASSES = 6;

// Memory of one thread for one row of a tile after the other.
struct ProductMemory {
  float* probabilities;  // (N, TILE_COLUMNS) of the masks
  float* lowest;         // (padded) bounds of the classes' scores
  float* highest;        // (padded)
  int64_t* candidates;   // (K)
};

ProductMemory make_product_memory(const MaskStrip& strip, const ClassProbabilities& classes, Arena& arena) {
  ProductMemory memory;
  memory.probabilities = arena.take<float>(strip.masks * TILE_COLUMNS);
  memory.lowest = arena.take<float>(classes.padded);
  memory.highest = arena.take<float>(classes.padded);
  memory.candidates = arena.take<int64_t>(classes.classes);
  return memory;
}

ProductMemory make_product_memory(const MaskStrip& strip, const ClassProbabilities& classes, void* workspace) {
  Arena arena{reinterpret_cast<uint64_t>(workspace)};
  return make_product_memory(strip, classes, arena);
}

size_t class_workspace_size(const MaskStrip& strip, const ClassProbabilities& classes) {
  Arena arena{0};
  make_product_memory(strip, classes, arena);
  return size_t(arena.next);
}

void load_probabilities(const MaskStrip& strip, const Tile& tile, int64_t row, float* probabilities) {
  for (int64_t n = 0; n < strip.masks; ++n, probabilities += TILE_COLUMNS) {
    Vector<float> logits[TILE_VECTORS];
    load_logits(strip, tile, n, row, logits);
    for (int v = 0; v < TILE_VECTORS; ++v) store(probabilities + v * width_of<float>(), probability_of(logits[v]));
  }
}

// Bounds of all classes' scores in the pixels of a row: what they would be if each mask had its lowest, or its highest,
// probability in all of them.
void bound_scores(const MaskStrip& strip, const ClassProbabilities& classes, const ProductMemory& memory,
                  int64_t columns) {
  constexpr int WIDTH = width_of<float>();
  for (int64_t k = 0; k < classes.padded; ++k) memory.lowest[k] = memory.highest[k] = 0.0f;
  for (int64_t n = 0; n < strip.masks; ++n) {
    const float* pixels = memory.probabilities + n * TILE_COLUMNS;
    float lowest = pixels[0], highest = pixels[0];
    if (columns == TILE_COLUMNS) {
      Vector<float> low = load<Vector<float>>(pixels), high = low;
      for (int64_t x = WIDTH; x < TILE_COLUMNS; x += WIDTH) {
        const Vector<float> next = load<Vector<float>>(pixels + x);
        low = next < low ? next : low;
        high = next > high ? next : high;
      }
      lowest = low[0], highest = high[0];
      for (int i = 1; i < WIDTH; ++i) {
        lowest = low[i] < lowest ? low[i] : lowest;
        highest = high[i] > highest ? high[i] : highest;
      }
    } else {
      for (int64_t x = 1; x < columns; ++x) {
        lowest = pixels[x] < lowest ? pixels[x] : lowest;
        highest = pixels[x] > highest ? pixels[x] : highest;
      }
    }
    const float* weights = classes.of_masks + n * classes.padded;
    for (int64_t k = 0; k < classes.padded; k += WIDTH) {
      const Vector<float> weight = load<Vector<float>>(weights + k);
      store(memory.lowest + k, load<Vector<float>>(memory.lowest + k) + lowest * weight);
      store(memory.highest + k, load<Vector<float>>(memory.highest + k) + highest * weight);
    }
  }
}

// Classes, in order, that may be the best one of a pixel: all but those whose highest score is less, by more than
// rounding, than the lowest score of another one. -> how many.
int64_t find_candidates(const MaskStrip& strip, const ClassProbabilities& classes, const ProductMemory& memory,
                        int64_t columns) {
  bound_scores(strip, classes, memory, columns);
  float threshold = 0.0f;
  for (int64_t k = 0; k < classes.classes; ++k)
    threshold = memory.lowest[k] > threshold ? memory.lowest[k] : threshold;
  threshold *= 0.999f;
  int64_t count = 0;
  for (int64_t k = 0; k < classes.classes; ++k)
    if (!(memory.highest[k] < threshold)) memory.candidates[count++] = k;  // NaN isn't less
  return count;
}

// Scores of some classes, whose probabilities (N) are given, in some pixels. `probabilities` (N, TILE_COLUMNS) begins at
// the first of them.
MASK2FORMER_INLINE void product_of_group(const float* const* of_classes, const float* probabilities, int64_t masks,
                                         Vector<float> (*sums)[PRODUCT_VECTORS]) {
  for (int k = 0; k < PRODUCT_CLASSES; ++k)
    for (int v = 0; v < PRODUCT_VECTORS; ++v) sums[k][v] = Vector<float>{};
  for (int64_t n = 0; n < masks; ++n, probabilities += TILE_COLUMNS) {
    Vector<float> pixels[PRODUCT_VECTORS];
    for (int v = 0; v < PRODUCT_VECTORS; ++v) pixels[v] = load<Vector<float>>(probabilities + v * width_of<float>());
    for (int k = 0; k < PRODUCT_CLASSES; ++k)
      for (int v = 0; v < PRODUCT_VECTORS; ++v) sums[k][v] += of_classes[k][n] * pixels[v];
  }
}

// Calls function(classes, how many, scores, first of the pixels' vectors) for all candidates and pixels of a row.
template <typename Function>
MASK2FORMER_INLINE void for_products(const MaskStrip& strip, const ClassProbabilities& classes,
                                     const ProductMemory& memory, int64_t candidates, Function function) {
  for (int first = 0; first < TILE_VECTORS; first += PRODUCT_VECTORS) {
    for (int64_t i = 0; i < candidates; i += PRODUCT_CLASSES) {
      const float* of_classes[PRODUCT_CLASSES];
      for (int64_t k = 0; k < PRODUCT_CLASSES; ++k) {  // the last one again where there are no more
        const int64_t candidate = memory.candidates[i + k < candidates ? i + k : candidates - 1];
        of_classes[k] = classes.of_classes + candidate * strip.masks;
      }
      Vector<float> sums[PRODUCT_CLASSES][PRODUCT_VECTORS];
      product_of_group(of_classes, memory.probabilities + first * width_of<float>(), strip.masks, sums);
      const int64_t rest = candidates - i;
      function(memory.candidates + i, rest < PRODUCT_CLASSES ? rest : PRODUCT_CLASSES, sums, first);
    }
  }
}

void class_labels(const MaskStrip& strip, const Tile& tile, const ClassProbabilities& classes, int32_t* labels,
                  void* workspace) {
  const ProductMemory memory = make_product_memory(strip, classes, workspace);
  const int64_t columns = tile.last_column - tile.first_column;
  for (int64_t row = tile.first_row; row < tile.last_row; ++row) {
    load_probabilities(strip, tile, row, memory.probabilities);
    const int64_t candidates = find_candidates(strip, classes, memory, columns);
    Vector<float> best[TILE_VECTORS];
    Integers<float> label[TILE_VECTORS];
    for (int v = 0; v < TILE_VECTORS; ++v) best[v] = Vector<float>{} - __builtin_inff(), label[v] = Integers<float>{};
    for_products(strip, classes, memory, candidates,
                 [&](const int64_t* numbers, int64_t count, const Vector<float>(*sums)[PRODUCT_VECTORS], int first) {
                   for (int64_t k = 0; k < count; ++k) {
                     const Integers<float> number = Integers<float>{} + int32_t(numbers[k]);
                     for (int v = 0; v < PRODUCT_VECTORS; ++v) {
                       const Integers<float> better = sums[k][v] > best[first + v];
                       best[first + v] = better ? sums[k][v] : best[first + v];
                       label[first + v] = better ? number : label[first + v];
                     }
                   }
                 });
    __builtin_memcpy(labels + row * strip.columns + tile.first_column, label, size_t(columns) * sizeof(int32_t));
  }
}

void class_scores(const MaskStrip& strip, const Tile& tile, const ClassProbabilities& classes, float* scores,
                  int64_t class_stride, int64_t row_stride, void* workspace) {
  constexpr int64_t TOGETHER = PRODUCT_VECTORS * width_of<float>();
  const ProductMemory memory = make_product_memory(strip, classes, workspace);
  const int64_t columns = tile.last_column - tile.first_column;
  for (int64_t k = 0; k < classes.classes; ++k) memory.candidates[k] = k;
  for (int64_t row = tile.first_row; row < tile.last_row; ++row) {
    float* const to = scores + row * row_stride + tile.first_column;
    load_probabilities(strip, tile, row, memory.probabilities);
    for_products(strip, classes, memory, classes.classes,
                 [&](const int64_t* numbers, int64_t count, const Vector<float>(*sums)[PRODUCT_VECTORS], int first) {
                   const int64_t column = first * width_of<float>(), left = columns - column;
                   if (left <= 0) return;
                   const size_t bytes = size_t(left < TOGETHER ? left : TOGETHER) * sizeof(float);
                   for (int64_t k = 0; k < count; ++k)
                     __builtin_memcpy(to + numbers[k] * class_stride + column, sums[k], bytes);
                 });
  }
}

// ------------------------------------------------------------------------------------------- panoptic

MASK2FORMER_INLINE int64_t sum_of(Integers<float> numbers) {
  int64_t sum = 0;
  for (int i = 0; i < width_of<float>(); ++i) sum += numbers[i];
  return sum;
}

void winners(const MaskStrip& strip, const Tile& tile, const Rivals& rivals) {
  const int64_t columns = tile.last_column - tile.first_column;
  for (int64_t row = tile.first_row; row < tile.last_row; ++row) {
    Vector<float> best[TILE_VECTORS], probability[TILE_VECTORS];
    Integers<float> winner[TILE_VECTORS];
    for (int v = 0; v < TILE_VECTORS; ++v) {
      best[v] = Vector<float>{} - __builtin_inff();
      probability[v] = Vector<float>{};
      winner[v] = Integers<float>{};
    }
    for (int64_t i = 0; i < rivals.count; ++i) {
      Vector<float> logits[TILE_VECTORS];
      load_logits(strip, tile, rivals.masks[i], row, logits);
      Integers<float> inside{};
      for (int v = 0; v < TILE_VECTORS; ++v) {
        const Vector<float> here = probability_of(logits[v]), value = rivals.scores[i] * here;
        inside -= here >= 0.5f;
        const Integers<float> better = value > best[v];
        best[v] = better ? value : best[v];
        probability[v] = better ? here : probability[v];
        winner[v] = better ? Integers<float>{} + int32_t(i) : winner[v];
      }
      rivals.whole[i] += sum_of(inside);
    }
    int32_t numbers[TILE_COLUMNS], inside[TILE_COLUMNS];
    for (int v = 0; v < TILE_VECTORS; ++v) {
      store(numbers + v * width_of<float>(), winner[v]);
      store(inside + v * width_of<float>(), probability[v] >= 0.5f);
    }
    int32_t* const to = rivals.winner + row * strip.columns + tile.first_column;
    for (int64_t x = 0; x < columns; ++x) {
      ++rivals.visible[numbers[x]];
      if (inside[x]) ++rivals.remaining[numbers[x]];
      to[x] = inside[x] ? numbers[x] : int32_t(rivals.count);
    }
  }
}

// ------------------------------------------------------------------------------------------- instances

typedef int8_t Bytes __attribute__((vector_size(MASK2FORMER_VECTOR_BYTES / 4)));

// Writes 1 where a logit is above 0; -> whether there is any.
MASK2FORMER_INLINE bool binarize(const Vector<float>* logits, uint8_t* inside) {
  for (int v = 0; v < TILE_VECTORS; ++v)
    store(inside + v * width_of<float>(), __builtin_convertvector(-(logits[v] > 0.0f), Bytes));
  uint64_t eight[TILE_COLUMNS / 8], any = 0;
  __builtin_memcpy(eight, inside, sizeof(eight));
  for (const uint64_t part : eight) any |= part;
  return any != 0;
}

void binary_masks(const MaskStrip& strip, const Tile& tile, const BinaryMasks& binary) {
  const int64_t columns = tile.last_column - tile.first_column;
  for (int64_t n = 0; n < strip.masks; ++n) {
    if (binary.copies[n] == binary.copies[n + 1]) continue;
    uint8_t* const in_columns = binary.in_columns + n * strip.columns + tile.first_column;
    Vector<float> above_half{};
    Integers<float> area{};
    for (int64_t row = tile.first_row; row < tile.last_row; ++row) {
      Vector<float> logits[TILE_VECTORS];
      load_logits(strip, tile, n, row, logits);
      uint8_t inside[TILE_COLUMNS];
      const bool any = binarize(logits, inside);
      for (int64_t i = binary.copies[n]; i < binary.copies[n + 1]; ++i)
        __builtin_memcpy(binary.masks + binary.places[i] * binary.mask_stride + row * binary.row_stride +
                             tile.first_column,
                         inside, size_t(columns));
      if (!any) continue;  // and so, no probability exceeds a half
      for (int v = 0; v < TILE_VECTORS; ++v) {
        const Integers<float> positive = logits[v] > 0.0f;
        area -= positive;
        above_half += positive ? probability_of(logits[v]) - 0.5f : Vector<float>{};
      }
      for (int64_t x = 0; x < columns; ++x) in_columns[x] |= inside[x];
      binary.in_rows[n * strip.rows + row] = 1;
    }
    binary.area[n] += sum_of(area);
    for (int i = 0; i < width_of<float>(); ++i) binary.above_half[n] += above_half[i];
  }
}

constexpr MaskKernels MASK_KERNELS{class_workspace_size, class_labels, class_scores, winners, binary_masks};
