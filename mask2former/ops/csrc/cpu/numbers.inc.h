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

// A vector of as many numbers as the capability's registers hold, and one of as many integers of the same size, which
// comparisons of vectors return. A quad is four numbers whatever the capability: a sample has four corners, and the
// samples of a head are mostly a multiple of four.
template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef int32_t integer;
  typedef float type __attribute__((vector_size(MASK2FORMER_VECTOR_BYTES)));
  typedef int32_t integers __attribute__((vector_size(MASK2FORMER_VECTOR_BYTES)));
  typedef float quad __attribute__((vector_size(16)));
  typedef int32_t quad_integers __attribute__((vector_size(16)));
};
template <>
struct VectorOf<double> {
  typedef int64_t integer;
  typedef double type __attribute__((vector_size(MASK2FORMER_VECTOR_BYTES)));
  typedef int64_t integers __attribute__((vector_size(MASK2FORMER_VECTOR_BYTES)));
  typedef double quad __attribute__((vector_size(32)));
  typedef int64_t quad_integers __attribute__((vector_size(32)));
};
template <typename T>
using Integer = typename VectorOf<T>::integer;
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
using Integers = typename VectorOf<T>::integers;
template <typename T>
using Quad = typename VectorOf<T>::quad;

typedef uint32_t Bits32 __attribute__((vector_size(MASK2FORMER_VECTOR_BYTES)));
typedef uint16_t Bits16 __attribute__((vector_size(MASK2FORMER_VECTOR_BYTES / 2)));
typedef int32_t HalfIntegers __attribute__((vector_size(MASK2FORMER_VECTOR_BYTES / 2)));
typedef uint64_t Addresses __attribute__((vector_size(MASK2FORMER_VECTOR_BYTES)));

#if defined(__clang__) || __GNUC__ >= 12
#define MASK2FORMER_SHUFFLE(T, a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define MASK2FORMER_SHUFFLE(T, a, b, i, j, k, l) \
  __builtin_shuffle(a, b, typename VectorOf<T>::quad_integers{i, j, k, l})
#endif

template <typename T>
constexpr int width_of() {
  return MASK2FORMER_VECTOR_BYTES / sizeof(T);
}

// A vector from memory of any alignment, and to it.
template <typename To, typename From>
MASK2FORMER_INLINE To load(const From* from) {
  To to;
  __builtin_memcpy(&to, from, sizeof(to));
  return to;
}
template <typename To, typename From>
MASK2FORMER_INLINE void store(To* to, const From& from) {
  __builtin_memcpy(to, &from, sizeof(from));
}

// How many vectors of addresses there are for a vector of integers.
template <typename T>
constexpr int ADDRESS_PARTS = sizeof(uint64_t) / sizeof(T);

MASK2FORMER_INLINE void widen(Integers<float> from, Addresses* to) {
  HalfIntegers half[2];
  __builtin_memcpy(half, &from, sizeof(from));
  for (int i = 0; i < 2; ++i) to[i] = __builtin_convertvector(half[i], Addresses);
}
MASK2FORMER_INLINE void widen(Integers<double> from, Addresses* to) { *to = (Addresses)from; }

// The four sums of four vectors' numbers; of numbers, themselves.
template <typename T>
MASK2FORMER_INLINE Quad<T> four_sums(const Vector<T>* vectors) {
  constexpr int WIDTH = width_of<T>();
  if constexpr (WIDTH < 4) {
    Quad<T> sums{};
    for (int i = 0; i < 4; ++i) sums[i] = vectors[i][0] + vectors[i][1];
    return sums;
  } else {
    Quad<T> folded[4];
    for (int i = 0; i < 4; ++i) {
      Quad<T> quads[WIDTH / 4];
      __builtin_memcpy(quads, vectors + i, sizeof(quads));
      folded[i] = quads[0];
      for (int k = 1; k < WIDTH / 4; ++k) folded[i] += quads[k];
    }
    const Quad<T> first = MASK2FORMER_SHUFFLE(T, folded[0], folded[1], 0, 1, 4, 5) +
                          MASK2FORMER_SHUFFLE(T, folded[0], folded[1], 2, 3, 6, 7);
    const Quad<T> second = MASK2FORMER_SHUFFLE(T, folded[2], folded[3], 0, 1, 4, 5) +
                           MASK2FORMER_SHUFFLE(T, folded[2], folded[3], 2, 3, 6, 7);
    return MASK2FORMER_SHUFFLE(T, first, second, 0, 2, 4, 6) + MASK2FORMER_SHUFFLE(T, first, second, 1, 3, 5, 7);
  }
}
template <typename T>
MASK2FORMER_INLINE Quad<T> four_sums(const T* numbers) {
  return load<Quad<T>>(numbers);
}

// exp(x) for -87 <= x <= 0, within 2 units in the last place, of a number or a vector and its bits.
template <typename Bits, typename Number>
MASK2FORMER_INLINE Number exp_in_range(Number x) {
  const Number shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the last bits are a rounded integer
  const Number power = shifted - 12582912.0f;
  const Number rest = (x - power * 0.693145752f) - power * 1.42860677e-6f;  // within +-log(2) / 2
  Number series = rest * (1.0f / 5040) + 1.0f / 720;
  series = series * rest + 1.0f / 120;
  series = series * rest + 1.0f / 24;
  series = series * rest + 1.0f / 6;
  series = series * rest + 0.5f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  return series * bit_cast<Number>((bit_cast<Bits>(shifted) - 0x4b400000u + 127u) << 23);
}

// exp(x) for x <= 0.
MASK2FORMER_INLINE Vector<float> exp_of_negative(Vector<float> x) {
  const Vector<float> product = exp_in_range<Bits32>(x < -87.0f ? Vector<float>{} - 87.0f : x);
  return x == x ? (x < -87.0f ? Vector<float>{} : product) : x;
}

// The same, but at least 1.6e-38.
MASK2FORMER_INLINE float exp_of_negative(float x) { return exp_in_range<uint32_t>(x < -87.0f ? -87.0f : x); }

// The same of `count` numbers in place.
MASK2FORMER_INLINE void exp_of_negative(float* numbers, int64_t count) {
  constexpr int WIDTH = width_of<float>();
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(numbers + i, exp_of_negative(load<Vector<float>>(numbers + i)));
  if (i == count) return;
  Vector<float> rest{};
  __builtin_memcpy(&rest, numbers + i, size_t(count - i) * sizeof(float));
  rest = exp_of_negative(rest);
  __builtin_memcpy(numbers + i, &rest, size_t(count - i) * sizeof(float));
}
MASK2FORMER_INLINE void exp_of_negative(double* numbers, int64_t count) {
  for (int64_t i = 0; i < count; ++i) numbers[i] = __builtin_exp(numbers[i]);
}

// Neighbouring channels as numbers to calculate with: VECTORS vectors, or a single channel where VECTORS is 0.
template <typename V, int VECTORS>
struct Channels {
  using Part = Vector<typename Sum<V>::type>;
  static constexpr int PARTS = VECTORS;
  Part part[PARTS];
};
template <typename V>
struct Channels<V, 0> {
  using Part = typename Sum<V>::type;
  static constexpr int PARTS = 1;
  Part part[PARTS];
};

// Whether the parts of Channels come in pairs, one of the even channels and one of the odd ones: the bits of two
// neighbouring bfloat16 make two floats with a shift and a mask, and nothing has to be moved between lanes.
template <typename V, int VECTORS>
constexpr bool IN_PAIRS = false;
template <>
constexpr bool IN_PAIRS<bfloat16, 2> = true;
template <>
constexpr bool IN_PAIRS<bfloat16, 4> = true;

MASK2FORMER_INLINE Vector<float> numbers_of(Bits16 half, bfloat16) {
  return (Vector<float>)(__builtin_convertvector(half, Bits32) << 16);
}
MASK2FORMER_INLINE Vector<float> numbers_of(Bits16 half, float16) {
  const Bits32 bits = __builtin_convertvector(half, Bits32), magnitude = (bits & 0x7fff) << 13;
  const Vector<float> scaled = (Vector<float>)magnitude * 0x1p112f;  // as in to_sum
  const Bits32 all_ones = (Bits32)(magnitude >= 0x0f800000u);
  const Bits32 number = (all_ones & (magnitude | 0x7f800000u)) | (~all_ones & (Bits32)scaled);
  return (Vector<float>)(number | ((bits & 0x8000) << 16));
}

template <typename V, int VECTORS>
MASK2FORMER_INLINE Channels<V, VECTORS> load_channels(const V* from) {
  Channels<V, VECTORS> to;
  if constexpr (VECTORS == 0) {
    to.part[0] = to_sum(*from);
  } else if constexpr (sizeof(V) == sizeof(typename Sum<V>::type)) {
    for (int i = 0; i < VECTORS; ++i) to.part[i] = load<Vector<V>>(from + i * width_of<V>());
  } else if constexpr (IN_PAIRS<V, VECTORS>) {
    for (int i = 0; i < VECTORS; i += 2) {
      const Bits32 bits = load<Bits32>(from + i * width_of<float>());
      to.part[i] = (Vector<float>)(bits << 16);
      to.part[i + 1] = (Vector<float>)(bits & 0xffff0000u);
    }
  } else {
    for (int i = 0; i < VECTORS; ++i) to.part[i] = numbers_of(load<Bits16>(from + i * width_of<float>()), V{});
  }
  return to;
}

// Sums in memory have the order of parts, whichever that is.
template <typename V, int VECTORS>
MASK2FORMER_INLINE Channels<V, VECTORS> load_sums(const typename Sum<V>::type* from) {
  using Part = typename Channels<V, VECTORS>::Part;
  Channels<V, VECTORS> to;
  for (int i = 0; i < to.PARTS; ++i) to.part[i] = load<Part>(from + i * int64_t(sizeof(Part) / sizeof(*from)));
  return to;
}

// Rounded as `from_sum` does, in the upper half of each number.
MASK2FORMER_INLINE Bits32 rounded_to_bfloat16(Vector<float> x) {
  const Bits32 bits = (Bits32)x, is_number = (Bits32)(x == x);
  return (is_number & (bits + 0x7fff + ((bits >> 16) & 1))) | (~is_number & 0x7fc00000u);
}

template <typename V, int VECTORS>
MASK2FORMER_INLINE void store_channels(const Channels<V, VECTORS>& from, V* to) {
  if constexpr (VECTORS == 0) {
    from_sum(from.part[0], to);
  } else if constexpr (sizeof(V) == sizeof(typename Sum<V>::type)) {
    for (int i = 0; i < VECTORS; ++i) store(to + i * width_of<V>(), from.part[i]);
  } else if constexpr (IN_PAIRS<V, VECTORS>) {
    for (int i = 0; i < VECTORS; i += 2)
      store(to + i * width_of<float>(), (rounded_to_bfloat16(from.part[i]) >> 16) |
                                            (rounded_to_bfloat16(from.part[i + 1]) & 0xffff0000u));
  } else {
    float numbers[VECTORS * width_of<float>()];
    __builtin_memcpy(numbers, from.part, sizeof(numbers));
    for (int i = 0; i < VECTORS * width_of<float>(); ++i) from_sum(numbers[i], to + i);
  }
}

// Calls function(Vectors<VECTORS>{}, channel) until all channels had their turn.
template <int N>
struct Vectors {
  static constexpr int COUNT = N;
};
template <typename V, typename Function>
MASK2FORMER_INLINE void for_channels(int64_t channels, Function function) {
  constexpr int WIDTH = width_of<typename Sum<V>::type>();
  int64_t channel = 0;
  for (; channel + 4 * WIDTH <= channels; channel += 4 * WIDTH) function(Vectors<4>{}, channel);
  if (channel + 2 * WIDTH <= channels) {
    function(Vectors<2>{}, channel);
    channel += 2 * WIDTH;
  }
  if (channel + WIDTH <= channels) {
    function(Vectors<1>{}, channel);
    channel += WIDTH;
  }
  for (; channel < channels; ++channel) function(Vectors<0>{}, channel);
}
