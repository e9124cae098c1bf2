// Vectors of numbers for one CPU capability, in its own namespace: see kernels.inc.h.

// Half types as their bits.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// What a type is summed up in.
template <typename T>
struct Sum {
  using type = float;
};
template <>
struct Sum<double> {
  using type = double;
};

template <typename To, typename From>
MASK2FORMER_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

MASK2FORMER_INLINE float to_sum(float x) { return x; }
MASK2FORMER_INLINE double to_sum(double x) { return x; }
MASK2FORMER_INLINE float to_sum(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
MASK2FORMER_INLINE float to_sum(float16 x) {
  // A half's exponent is 112 smaller than a float's of the same value; infinity and NaN have all exponent bits set.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000) << 16);
}

MASK2FORMER_INLINE void from_sum(float x, float* to) { *to = x; }
MASK2FORMER_INLINE void from_sum(double x, double* to) { *to = x; }
MASK2FORMER_INLINE void from_sum(float x, bfloat16* to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}
MASK2FORMER_INLINE void from_sum(float x, float16* to) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint32_t sign = (bits >> 16) & 0x8000;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00;  // rounds to more than the largest
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 halves are multiples of 2^-24, as floats from 0.5 are: the addition rounds.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000u) >> 13;  // to nearest, ties to even
  }
  to->bits = uint16_t(sign | half);
}

// exp(x) for x <= 0, within 2 units in the last place; without a branch, so that loops over it vectorise.
MASK2FORMER_INLINE float exp_of_negative(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the rounded integer
  const float power = shifted - 12582912.0f;
  const float rest = (clamped - power * 0.693145752f) - power * 1.42860677e-6f;  // within +-log(2) / 2
  float series = 1.0f / 5040;
  series = series * rest + 1.0f / 720;
  series = series * rest + 1.0f / 120;
  series = series * rest + 1.0f / 24;
  series = series * rest + 1.0f / 6;
  series = series * rest + 0.5f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  const float scale = bit_cast<float>((bit_cast<uint32_t>(shifted) - 0x4b400000u + 127u) << 23);
  return x != x ? x : (x < -87.0f ? 0.0f : series * scale);
}
MASK2FORMER_INLINE double exp_of_negative(double x) { return __builtin_exp(x); }

// A vector of as many numbers as the capability's registers hold.
template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(MASK2FORMER_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(MASK2FORMER_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

constexpr int FLOATS = MASK2FORMER_VECTOR_BYTES / 4;
typedef uint32_t Bits32 __attribute__((vector_size(MASK2FORMER_VECTOR_BYTES)));
typedef uint16_t Bits16 __attribute__((vector_size(MASK2FORMER_VECTOR_BYTES / 2)));

template <typename T>
constexpr int64_t width_of() {
  return MASK2FORMER_VECTOR_BYTES / sizeof(T);
}

template <typename T>
MASK2FORMER_INLINE Vector<T> load_plain(const T* from) {
  Vector<T> vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}
MASK2FORMER_INLINE Vector<float> load(const float* from) { return load_plain(from); }
MASK2FORMER_INLINE Vector<double> load(const double* from) { return load_plain(from); }
MASK2FORMER_INLINE Vector<float> load(const bfloat16* from) {
  Bits16 bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return (Vector<float>)(__builtin_convertvector(bits, Bits32) << 16);
}
MASK2FORMER_INLINE Vector<float> load(const float16* from) {
  Bits16 half;
  __builtin_memcpy(&half, from, sizeof(half));
  const Bits32 bits = __builtin_convertvector(half, Bits32), magnitude = (bits & 0x7fff) << 13;
  const Vector<float> scaled = (Vector<float>)magnitude * 0x1p112f;  // as in to_sum
  const Bits32 all_ones = (Bits32)(magnitude >= 0x0f800000u);
  const Bits32 number = (all_ones & (magnitude | 0x7f800000u)) | (~all_ones & (Bits32)scaled);
  return (Vector<float>)(number | ((bits & 0x8000) << 16));
}

template <typename T>
MASK2FORMER_INLINE void store(T* to, Vector<T> vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

// Halves the vector until one number is left: the same order of additions for every capability's own width.
template <typename T>
MASK2FORMER_INLINE T sum_of(Vector<T> vector) {
  T numbers[width_of<T>()];
  __builtin_memcpy(numbers, &vector, sizeof(vector));
  for (int64_t half = width_of<T>() / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) numbers[i] += numbers[i + half];
  return numbers[0];
}
