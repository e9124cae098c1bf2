// Kernels for masks at points, for one CPU capability, in its own namespace: see kernels.inc.h.
//
// Loops are plain, and without branches so that the compiler makes vectors of them.

// ------------------------------------------------------------------------------------------- random numbers

// 16 generators side by side, whatever the capability: the numbers are the same.
typedef uint32_t Lanes __attribute__((vector_size(64)));
typedef int32_t IntegerLanes __attribute__((vector_size(64)));
typedef float FloatLanes __attribute__((vector_size(64)));
constexpr int LANES = 16;

// The output function of SplitMix64 (Steele, Lea and Flood, 2014), which makes unlike numbers of like ones.
MASK2FORMER_INLINE uint64_t mixed(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// xoshiro128+ (Blackman and Vigna, 2018), whose upper bits are meant for floats.
MASK2FORMER_INLINE void next_numbers(Lanes state[4], FloatLanes& numbers) {
  const Lanes sum = state[0] + state[3], shifted = state[1] << 9;
  state[2] ^= state[0];
  state[3] ^= state[1];
  state[1] ^= state[2];
  state[0] ^= state[3];
  state[2] ^= shifted;
  state[3] = (state[3] << 11) | (state[3] >> 21);
  numbers = __builtin_convertvector((IntegerLanes)(sum >> 8), FloatLanes) * 0x1p-23f - 1.0f;
}

void uniform(uint64_t seed, uint64_t block, int64_t count, float* numbers) {
  uint32_t start[4][LANES];
  for (int lane = 0; lane < LANES; ++lane) {
    for (int half = 0; half < 2; ++half) {
      const uint64_t bits = mixed(seed + 0x9e3779b97f4a7c15u * ((block * LANES + lane) * 2 + half + 1));
      start[2 * half][lane] = uint32_t(bits);
      start[2 * half + 1][lane] = uint32_t(bits >> 32);
    }
  }
  Lanes state[4];
  __builtin_memcpy(state, start, sizeof(state));
  FloatLanes next;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    next_numbers(state, next);
    __builtin_memcpy(numbers + i, &next, sizeof(next));
  }
  next_numbers(state, next);
  for (int lane = 0; i < count; ++i, ++lane) numbers[i] = next[lane];
}

// ------------------------------------------------------------------------------------------- sampling

constexpr int64_t POINTS_AT_A_TIME = 256;  // what is found of them stays in the first cache

// For each point, the first of two neighbouring cells in the upper of two rows, and the weights of both columns and
// rows: 1 at a cell's centre, falling to 0 over the distance of a cell. So cells beyond the map need no care: where one
// of the two nearest is missing, the pair is moved by one, and the other cell of it is too far away to count.
struct Corners {
  int32_t first[POINTS_AT_A_TIME];
  float left[POINTS_AT_A_TIME];
  float right[POINTS_AT_A_TIME];
  float upper[POINTS_AT_A_TIME];
  float lower[POINTS_AT_A_TIME];
};

// In cells, 0 is the centre of the first one. Beyond the map's edge by half a cell or more all weights are 0; at NaN too.
MASK2FORMER_INLINE float in_cells(float coordinate, float size) {
  const float cells = ((coordinate + 1) * size - 1) / 2;
  const float above = cells > -1 ? cells : -1;
  return above < size ? above : size;
}

MASK2FORMER_INLINE int32_t between(int32_t lowest, int32_t number, int32_t highest) {
  const int32_t above = number > lowest ? number : lowest;
  return above < highest ? above : highest;
}

MASK2FORMER_INLINE float tent(float distance) {
  const float weight = 1 - __builtin_fabsf(distance);
  return weight > 0 ? weight : 0;
}

MASK2FORMER_INLINE void find_corners(const float* points, int64_t count, MapSize size, Corners& corners) {
  const int32_t width = int32_t(size.width), last_column = width - 2, last_row = int32_t(size.height) - 2;
  for (int64_t i = 0; i < count; ++i) {
    const float x = in_cells(points[2 * i], float(size.width)), y = in_cells(points[2 * i + 1], float(size.height));
    const int32_t column = between(0, int32_t(x), last_column), row = between(0, int32_t(y), last_row);
    corners.first[i] = row * width + column;
    corners.left[i] = tent(x - float(column));
    corners.right[i] = tent(x - float(column) - 1);
    corners.upper[i] = tent(y - float(row));
    corners.lower[i] = tent(y - float(row) - 1);
  }
}

MASK2FORMER_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename V>
void sample_of(const V* map, MapSize size, const float* points, int64_t count, float* values) {
  Corners corners;
  V upper[2 * POINTS_AT_A_TIME], lower[2 * POINTS_AT_A_TIME];
  for (int64_t start = 0; start < count; start += POINTS_AT_A_TIME) {
    const int64_t here = smaller(POINTS_AT_A_TIME, count - start);
    find_corners(points + 2 * start, here, size, corners);
    for (int64_t i = 0; i < here; ++i) {
      const V* cell = map + corners.first[i];
      __builtin_memcpy(upper + 2 * i, cell, 2 * sizeof(V));
      __builtin_memcpy(lower + 2 * i, cell + size.width, 2 * sizeof(V));
    }
    for (int64_t i = 0; i < here; ++i) {
      const float above = corners.left[i] * float(upper[2 * i]) + corners.right[i] * float(upper[2 * i + 1]);
      const float below = corners.left[i] * float(lower[2 * i]) + corners.right[i] * float(lower[2 * i + 1]);
      values[start + i] = corners.upper[i] * above + corners.lower[i] * below;
    }
  }
}

void sample(const float* map, MapSize size, const float* points, int64_t count, float* values) {
  sample_of(map, size, points, count, values);
}

void sample_bools(const uint8_t* map, MapSize size, const float* points, int64_t count, float* values) {
  sample_of(map, size, points, count, values);
}

void spread(const float* values, const float* points, int64_t count, float* map, MapSize size) {
  Corners corners;
  float share[4][POINTS_AT_A_TIME];
  __builtin_memset(map, 0, size_t(size.height * size.width) * sizeof(float));
  for (int64_t start = 0; start < count; start += POINTS_AT_A_TIME) {
    const int64_t here = smaller(POINTS_AT_A_TIME, count - start);
    find_corners(points + 2 * start, here, size, corners);
    for (int64_t i = 0; i < here; ++i) {
      const float above = values[start + i] * corners.upper[i], below = values[start + i] * corners.lower[i];
      share[0][i] = above * corners.left[i];
      share[1][i] = above * corners.right[i];
      share[2][i] = below * corners.left[i];
      share[3][i] = below * corners.right[i];
    }
    for (int64_t i = 0; i < here; ++i) {
      float* cell = map + corners.first[i];
      cell[0] += share[0][i];
      cell[1] += share[1][i];
      cell[size.width] += share[2][i];
      cell[size.width + 1] += share[3][i];
    }
  }
}

// ------------------------------------------------------------------------------------------- uncertain points

// Integers in the order of the numbers' distances from zero.
MASK2FORMER_INLINE uint32_t magnitude(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits & 0x7fffffffu;
}

// The `rank`-th smallest magnitude, from 1: of all 2^31 there are, three quarters are ruled out at a time by counting,
// which has no branches to guess and is faster than sorting in part.
uint32_t magnitude_of_rank(const float* values, int64_t count, int64_t rank) {
  uint32_t lowest = 0;
  for (uint32_t step = 1u << 29;; step /= 4) {
    const uint32_t first = lowest + step, second = first + step, third = second + step;
    int32_t below_first = 0, below_second = 0, below_third = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t here = magnitude(values[i]);
      below_first += here < first;
      below_second += here < second;
      below_third += here < third;
    }
    lowest += step * uint32_t((below_first < rank) + (below_second < rank) + (below_third < rank));
    if (step == 1) return lowest;
    if (step == 2) step = 4;
  }
}

void nearest_to_zero(const float* points, const float* values, int64_t count, int64_t kept, float* kept_points,
                     float* kept_values) {
  if (kept == 0) return;
  const uint32_t farthest = magnitude_of_rank(values, count, kept);
  int64_t found = 0, below = 0;
  for (int64_t i = 0; i < count; ++i) below += magnitude(values[i]) < farthest;
  // What is written for a value that isn't kept is written over by the next.
  for (int64_t i = 0; found < below; ++i) {
    __builtin_memcpy(kept_points + 2 * found, points + 2 * i, 2 * sizeof(float));
    kept_values[found] = values[i];
    found += magnitude(values[i]) < farthest;
  }
  for (int64_t i = 0; found < kept; ++i) {
    __builtin_memcpy(kept_points + 2 * found, points + 2 * i, 2 * sizeof(float));
    kept_values[found] = values[i];
    found += magnitude(values[i]) == farthest;
  }
}

// ------------------------------------------------------------------------------------------- losses

// log(1 + x) for x in [0, 1], as 2 artanh(x / (2 + x)).
MASK2FORMER_INLINE float log_of_one_plus(float x) {
  const float root = x / (2 + x), square = root * root;  // at most 1/3 and 1/9
  float series = square * (1.0f / 15) + 1.0f / 13;
  series = series * square + 1.0f / 11;
  series = series * square + 1.0f / 9;
  series = series * square + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  series = series * square + 1.0f;
  return 2 * root * series;
}

MASK2FORMER_INLINE float sigmoid(float x, float exp_of_minus_magnitude) {
  return (x < 0 ? exp_of_minus_magnitude : 1.0f) / (1.0f + exp_of_minus_magnitude);
}

MASK2FORMER_INLINE float softplus(float x, float exp_of_minus_magnitude) {
  return (x < 0 ? 0 : x) + log_of_one_plus(exp_of_minus_magnitude);
}

MASK2FORMER_INLINE float sum_of(const float* numbers, int64_t count) {
  FloatLanes lanes{};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    FloatLanes next;
    __builtin_memcpy(&next, numbers + i, sizeof(next));
    lanes += next;
  }
  float sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += lanes[lane];
  for (; i < count; ++i) sum += numbers[i];
  return sum;
}

void loss_sums(const float* logits, const float* labels, int64_t count, float sums[4]) {
  float entropy[POINTS_AT_A_TIME], probability[POINTS_AT_A_TIME], product[POINTS_AT_A_TIME];
  double total[4] = {};
  for (int64_t start = 0; start < count; start += POINTS_AT_A_TIME) {
    const int64_t here = smaller(POINTS_AT_A_TIME, count - start);
    const float* label = labels + start;
    for (int64_t i = 0; i < here; ++i) {
      const float x = logits[start + i], exponential = exp_of_negative(-__builtin_fabsf(x));
      entropy[i] = softplus(x, exponential) - x * label[i];
      probability[i] = sigmoid(x, exponential);
      product[i] = probability[i] * label[i];
    }
    const float* parts[4] = {entropy, probability, label, product};
    for (int k = 0; k < 4; ++k) total[k] += double(sum_of(parts[k], here));
  }
  for (int k = 0; k < 4; ++k) sums[k] = float(total[k]);
}

void loss_sums_backward(const float grad[4], const float* logits, const float* labels, int64_t count,
                        float* gradients) {
  const float of_entropy = grad[0], of_probability = grad[1], of_product = grad[3];
  for (int64_t i = 0; i < count; ++i) {
    const float x = logits[i], exponential = exp_of_negative(-__builtin_fabsf(x)), s = sigmoid(x, exponential);
    const float slope = exponential / ((1 + exponential) * (1 + exponential));  // s (1 - s), without its cancellation
    gradients[i] = of_entropy * (s - labels[i]) + slope * (of_probability + of_product * labels[i]);
  }
}

void to_probabilities(float* logits, int64_t count, float sums[2]) {
  float entropy[POINTS_AT_A_TIME];
  double total[2] = {};
  for (int64_t start = 0; start < count; start += POINTS_AT_A_TIME) {
    const int64_t here = smaller(POINTS_AT_A_TIME, count - start);
    float* next = logits + start;
    for (int64_t i = 0; i < here; ++i) {
      const float x = next[i], exponential = exp_of_negative(-__builtin_fabsf(x));
      entropy[i] = softplus(x, exponential);
      next[i] = sigmoid(x, exponential);
    }
    total[0] += double(sum_of(entropy, here));
    total[1] += double(sum_of(next, here));
  }
  for (int k = 0; k < 2; ++k) sums[k] = float(total[k]);
}

constexpr PointKernels POINT_KERNELS{uniform,         sample,    sample_bools,       spread,
                                     nearest_to_zero, loss_sums, loss_sums_backward, to_probabilities};
