// Vectors as wide as the instruction set this file is compiled for, and the few operations the kernels need.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace msda {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bfloat16 {
  uint16_t bits;
};

// Element types: Value is what memory holds, Sum what is computed with.
template <typename Value>
struct Types {
  using Sum = Value;
};
template <>
struct Types<bfloat16> {
  using Sum = float;
};

template <typename Sum>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Sum));

typedef float FloatVec __attribute__((vector_size(kVectorBytes), may_alias));
typedef double DoubleVec __attribute__((vector_size(kVectorBytes), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kVectorBytes), may_alias));
typedef int64_t LongVec __attribute__((vector_size(kVectorBytes), may_alias));
typedef uint32_t UintVec __attribute__((vector_size(kVectorBytes), may_alias));
typedef uint16_t ShortVec __attribute__((vector_size(kVectorBytes / 2), may_alias));

// Memory that begins at a cache line: an unaligned 64-byte access would touch two. Its content is undefined at first.
template <typename T>
class AlignedArray {
 public:
  explicit AlignedArray(int64_t size) : memory_(new char[size * sizeof(T) + kLine]) {
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + kLine - 1) / kLine * kLine);
  }
  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  static constexpr uintptr_t kLine = 64;
  std::unique_ptr<char[]> memory_;
  T* data_;
};

template <typename Sum>
struct VecOf;
template <>
struct VecOf<float> {
  using type = FloatVec;
  using index = int32_t;
  using index_type = IntVec;
};
template <>
struct VecOf<double> {
  using type = DoubleVec;
  using index = int64_t;
  using index_type = LongVec;
};
template <typename Sum>
using Vec = typename VecOf<Sum>::type;
// Integers as wide as Sum: conversions and comparisons then keep the number of lanes.
template <typename Sum>
using Index = typename VecOf<Sum>::index;
template <typename Sum>
using IndexVec = typename VecOf<Sum>::index_type;

template <typename V, typename T>
inline V load_bits(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline FloatVec load(const float* p) { return load_bits<FloatVec>(p); }
inline DoubleVec load(const double* p) { return load_bits<DoubleVec>(p); }
inline FloatVec load(const bfloat16* p) {
  const UintVec wide = __builtin_convertvector(load_bits<ShortVec>(p), UintVec) << 16;
  return load_bits<FloatVec>(&wide);
}

template <typename T, typename V>
inline void store_bits(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

inline void store(float* p, FloatVec v) { store_bits(p, v); }
inline void store(double* p, DoubleVec v) { store_bits(p, v); }
inline void store(bfloat16* p, FloatVec v) {
  // Round to nearest even; NaN stays NaN because its carry would otherwise turn it into infinity or zero.
  const UintVec bits = load_bits<UintVec>(&v);
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UintVec is_nan = (bits & 0x7fffffff) > 0x7f800000;
  store_bits(p, __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), ShortVec));
}

// The first n elements; the other lanes are zero, their memory is neither read nor written.
template <typename Value>
inline Vec<typename Types<Value>::Sum> load_part(const Value* p, int n) {
  Value part[kLanes<typename Types<Value>::Sum>] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}

template <typename Value>
inline void store_part(Value* p, Vec<typename Types<Value>::Sum> v, int n) {
  Value part[kLanes<typename Types<Value>::Sum>];
  store(part, v);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

template <typename Sum, int... I>
inline Vec<Sum> pick(Vec<Sum> a, Vec<Sum> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, IndexVec<Sum>{I...});
#endif
}

// a0 b0 a1 b1 ... in two vectors -> all a and all b, and back.
template <typename Sum, int... I>
inline void split_pairs(Vec<Sum> first, Vec<Sum> second, Vec<Sum>& a, Vec<Sum>& b, std::integer_sequence<int, I...>) {
  a = pick<Sum>(first, second, std::integer_sequence<int, (2 * I)...>());
  b = pick<Sum>(first, second, std::integer_sequence<int, (2 * I + 1)...>());
}

template <typename Sum>
inline void split_pairs(Vec<Sum> first, Vec<Sum> second, Vec<Sum>& a, Vec<Sum>& b) {
  split_pairs<Sum>(first, second, a, b, std::make_integer_sequence<int, kLanes<Sum>>());
}

template <typename Sum, int... I>
inline void join_pairs(Vec<Sum> a, Vec<Sum> b, Vec<Sum>& first, Vec<Sum>& second, std::integer_sequence<int, I...>) {
  constexpr int n = kLanes<Sum>;
  first = pick<Sum>(a, b, std::integer_sequence<int, (I / 2 + (I % 2) * n)...>());
  second = pick<Sum>(a, b, std::integer_sequence<int, (I / 2 + n / 2 + (I % 2) * n)...>());
}

template <typename Sum>
inline void join_pairs(Vec<Sum> a, Vec<Sum> b, Vec<Sum>& first, Vec<Sum>& second) {
  join_pairs<Sum>(a, b, first, second, std::make_integer_sequence<int, kLanes<Sum>>());
}

// out[k] += sum of the lanes of v[k], k = 0..3.
template <typename Sum>
inline void add_lane_sums(const Vec<Sum> (&v)[4], Sum* out) {
  for (int k = 0; k < 4; ++k) {
    Sum sum = 0;
    for (int i = 0; i < kLanes<Sum>; ++i) sum += v[k][i];
    out[k] += sum;
  }
}

#if defined(__AVX2__)
// Four sums at once: after two rounds of shuffles every 128-bit part holds one partial sum of each vector.
inline void add_lane_sums(const FloatVec (&v)[4], float* out) {
#if defined(__AVX512F__)
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
  const __m256 a = (__m256)v[0], b = (__m256)v[1], c = (__m256)v[2], d = (__m256)v[3];
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256 half = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
#endif
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}
#endif

}  // namespace
}  // namespace msda
