// Vector verbs: the few operations that kernels written once for every instruction-set level need.
//
// `F32` holds kWidth floats: 1 (scalar), 8 (avx2), 16 (avx512). Everything lives in the namespace of the level and is
// always inlined, so that no code of one level can end up in another (docs/ARCHITECTURE.md). Loads and stores are
// unaligned; `load_n` / `store_n` touch exactly n elements. bf16 and fp16 elements are passed as uint16_t with a tag.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops.h"

#if defined(PYKD_LEVEL_avx2) || defined(PYKD_LEVEL_avx512)
// GCC 12 warns about its own intrinsics that start from an undefined vector (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#define PYKD_INLINE inline __attribute__((always_inline))

namespace pykd::PYKD_LEVEL {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

PYKD_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

PYKD_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// --- scalar conversions, used by the scalar level and for single elements everywhere -------------------------------

PYKD_INLINE float to_float(float x) { return x; }

PYKD_INLINE float to_float(BF16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

PYKD_INLINE float to_float(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Scaling by 2^112 turns the half's exponent bias into the float's and normalises subnormals exactly.
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);
  return bits_to_float(sign | float_to_bits(scaled));
}

template <class T>
PYKD_INLINE T from_float(float x);

template <>
PYKD_INLINE float from_float<float>(float x) {
  return x;
}

template <>
PYKD_INLINE BF16 from_float<BF16>(float x) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return BF16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return BF16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
PYKD_INLINE F16 from_float<F16>(float x) {  // round to nearest even; overflow to infinity; NaN stays NaN
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return F16{static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
  if (magnitude >= 0x47800000u) return F16{static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // subnormal half: adding 0.5 aligns the mantissa so that its low bits are the result
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return F16{static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return F16{static_cast<uint16_t>(sign | (rounded >> 13))};
}

// --- F32: the vector
// --------------------------------------------------------------------------------------------------

#if defined(PYKD_LEVEL_avx512)

constexpr int kWidth = 16;
struct F32 {
  __m512 v;
};
PYKD_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
PYKD_INLINE F32 set1(float x) { return {_mm512_set1_ps(x)}; }
PYKD_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
PYKD_INLINE F32 load(const BF16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
PYKD_INLINE F32 load(const F16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// The first n (0 <= n < kWidth) elements at p; the other lanes hold `fill`.
PYKD_INLINE F32 load_n(const float* p, int64_t n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), p)};
}
PYKD_INLINE F32 load_n(const BF16* p, int64_t n, float fill) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  return {
      _mm512_mask_blend_ps(first_lanes(n), _mm512_set1_ps(fill), _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)))};
}
PYKD_INLINE F32 load_n(const F16* p, int64_t n, float fill) {
  return {_mm512_mask_cvtph_ps(_mm512_set1_ps(fill), first_lanes(n), _mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
PYKD_INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
PYKD_INLINE __m512i odd_words() {  // the numbers of the upper halves in a pair of vectors
  return _mm512_setr_epi32(0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015, 0x001b0019,
                           0x001f001d, 0x00230021, 0x00270025, 0x002b0029, 0x002f002d, 0x00330031, 0x00370035,
                           0x003b0039, 0x003f003d);
}
// Rounded to bf16 in the upper halves; what the lower ones hold does not count.
PYKD_INLINE __m512i bf16_upper(F32 x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i even = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_mask_add_epi32(even, odd, bits, _mm512_set1_epi32(0x8000));
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}
PYKD_INLINE __m256i bf16_bits(F32 x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_upper(x), 16)); }
PYKD_INLINE __m256i f16_bits(F32 x) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
PYKD_INLINE void store(BF16* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bf16_bits(x)); }
PYKD_INLINE void store(F16* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), f16_bits(x)); }
PYKD_INLINE void store_two(BF16* p, F32 first, F32 second) {  // fewer operations than two stores
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(bf16_upper(first), odd_words(), bf16_upper(second)));
}
PYKD_INLINE void store_n(float* p, F32 x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }
PYKD_INLINE void store_n(BF16* p, F32 x, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), bf16_bits(x)); }
PYKD_INLINE void store_n(F16* p, F32 x, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), f16_bits(x)); }
PYKD_INLINE F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
PYKD_INLINE F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
PYKD_INLINE F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
PYKD_INLINE F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
PYKD_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
PYKD_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
PYKD_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }                  // b where either is NaN
PYKD_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }                  // b where either is NaN
PYKD_INLINE F32 round_even(F32 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
struct Mask {
  __mmask16 m;
};
PYKD_INLINE Mask less(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
PYKD_INLINE Mask equal(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
PYKD_INLINE F32 select(Mask m, F32 yes, F32 no) { return {_mm512_mask_blend_ps(m.m, no.v, yes.v)}; }
PYKD_INLINE F32 scale_by_power(F32 x, F32 n) {  // x * 2^n for integral n in [-127, 128]
  return {_mm512_scalef_ps(x.v, n.v)};
}
PYKD_INLINE F32 fms(F32 a, F32 b, F32 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }  // a * b - c
// 2^(n / 16) for an integer n in the low bits of x: entry k is the bits of 2^(k / 16) less k << 19, so that adding
// n << 19 to entry n mod 16 sets the exponent and nothing else.
PYKD_INLINE F32 power_of_two(F32 x) {
  const __m512i table =
      _mm512_setr_epi32(0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
                        0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d);
  const __m512i n = _mm512_castps_si512(x.v);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_permutexvar_epi32(n, table), _mm512_slli_epi32(n, 19)))};
}
PYKD_INLINE F32 quotient_exponent(F32 x, F32 y, F32* scaled) {  // x = scaled * 2^(result * 2^-23), see `log_quotient`
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i near = _mm512_add_epi32(_mm512_sub_epi32(bits, _mm512_castps_si512(y.v)), _mm512_set1_epi32(1 << 22));
  const __m512i whole = _mm512_and_si512(near, _mm512_set1_epi32(-(1 << 23)));
  *scaled = {_mm512_castsi512_ps(_mm512_sub_epi32(bits, whole))};
  return {_mm512_cvtepi32_ps(whole)};
}

#elif defined(PYKD_LEVEL_avx2)

constexpr int kWidth = 8;
struct F32 {
  __m256 v;
};
PYKD_INLINE F32 set1(float x) { return {_mm256_set1_ps(x)}; }
PYKD_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
PYKD_INLINE F32 load(const BF16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
PYKD_INLINE F32 load(const F16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
PYKD_INLINE void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
PYKD_INLINE __m128i bf16_bits(F32 x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
PYKD_INLINE void store(BF16* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bf16_bits(x)); }
PYKD_INLINE void store(F16* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PYKD_INLINE F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
PYKD_INLINE F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
PYKD_INLINE F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
PYKD_INLINE F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
PYKD_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
PYKD_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
PYKD_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
PYKD_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
PYKD_INLINE F32 round_even(F32 x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
struct Mask {
  __m256 m;
};
PYKD_INLINE Mask less(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
PYKD_INLINE Mask equal(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
PYKD_INLINE F32 select(Mask m, F32 yes, F32 no) { return {_mm256_blendv_ps(no.v, yes.v, m.m)}; }
PYKD_INLINE F32 scale_by_power(F32 x, F32 n) {
  // Two exact factors, so that results below the smallest normal number round once, as scalef does.
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 second =
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, first), second)};
}
PYKD_INLINE F32 fms(F32 a, F32 b, F32 c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }  // a * b - c
PYKD_INLINE F32 power_of_two(F32 x) {                                                  // 2^(n / 8), as at avx512
  const __m256i table =
      _mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7);
  const __m256i n = _mm256_castps_si256(x.v);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_permutevar8x32_epi32(table, n), _mm256_slli_epi32(n, 20)))};
}
PYKD_INLINE F32 quotient_exponent(F32 x, F32 y, F32* scaled) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i near = _mm256_add_epi32(_mm256_sub_epi32(bits, _mm256_castps_si256(y.v)), _mm256_set1_epi32(1 << 22));
  const __m256i whole = _mm256_and_si256(near, _mm256_set1_epi32(-(1 << 23)));
  *scaled = {_mm256_castsi256_ps(_mm256_sub_epi32(bits, whole))};
  return {_mm256_cvtepi32_ps(whole)};
}

#else  // scalar

constexpr int kWidth = 1;
struct F32 {
  float v;
};
PYKD_INLINE F32 set1(float x) { return {x}; }
template <class T>
PYKD_INLINE F32 load(const T* p) {
  return {to_float(*p)};
}
template <class T>
PYKD_INLINE void store(T* p, F32 x) {
  *p = from_float<T>(x.v);
}
PYKD_INLINE F32 add(F32 a, F32 b) { return {a.v + b.v}; }
PYKD_INLINE F32 sub(F32 a, F32 b) { return {a.v - b.v}; }
PYKD_INLINE F32 mul(F32 a, F32 b) { return {a.v * b.v}; }
PYKD_INLINE F32 div(F32 a, F32 b) { return {a.v / b.v}; }
PYKD_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
PYKD_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {c.v - a.v * b.v}; }
PYKD_INLINE F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
PYKD_INLINE F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
PYKD_INLINE F32 round_even(F32 x) {  // for |x| < 2^22: the addition leaves no room for a fraction
  const float magic = 12582912.0f;
  volatile float shifted = x.v + magic;
  return {shifted - magic};
}
struct Mask {
  bool m;
};
PYKD_INLINE Mask less(F32 a, F32 b) { return {a.v < b.v}; }
PYKD_INLINE Mask equal(F32 a, F32 b) { return {a.v == b.v}; }
PYKD_INLINE F32 select(Mask m, F32 yes, F32 no) { return m.m ? yes : no; }
PYKD_INLINE F32 scale_by_power(F32 x, F32 n) {
  const int whole = static_cast<int>(n.v);
  const int half = whole >> 1;
  const float first = bits_to_float(static_cast<uint32_t>(half + 127) << 23);
  const float second = bits_to_float(static_cast<uint32_t>(whole - half + 127) << 23);
  return {x.v * first * second};
}
// The low nine bits of x become sign and exponent, the mantissa is 0.
PYKD_INLINE F32 low_bits_to_exponent(F32 x) { return {bits_to_float(float_to_bits(x.v) << 23)}; }
PYKD_INLINE F32 quotient_exponent(F32 x, F32 y, F32* scaled) {
  const uint32_t bits = float_to_bits(x.v);
  const uint32_t whole = (bits - float_to_bits(y.v) + (1u << 22)) & 0xff800000u;
  *scaled = {bits_to_float(bits - whole)};
  return {static_cast<float>(static_cast<int32_t>(whole))};
}

#endif

// --- verbs built from the above
// -----------------------------------------------------------------------------------------

#if !defined(PYKD_LEVEL_avx512)
// The first n (0 <= n < kWidth) elements at p; the other lanes hold `fill`.
template <class T>
PYKD_INLINE F32 load_n(const T* p, int64_t n, float fill) {
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}

#if defined(PYKD_LEVEL_avx2)
PYKD_INLINE F32 load_n(const float* p, int64_t n, float fill) {
  const __m256i exists =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, exists), _mm256_castsi256_ps(exists))};
}
#endif

template <class T>
PYKD_INLINE void store_n(T* p, F32 x, int64_t n) {
  float lanes[kWidth];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(lanes[i]);
}
#endif

// Two vectors, one behind the other.
template <class T>
PYKD_INLINE void store_two(T* p, F32 first, F32 second) {
  store(p, first);
  store(p + kWidth, second);
}

#if defined(PYKD_LEVEL_avx512) || defined(PYKD_LEVEL_avx2)
template <class Verb>
PYKD_INLINE float reduce(__m256 x, const Verb& verb) {
  const __m128 four = verb(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = verb(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(verb(two, _mm_movehdup_ps(two)));
}
#endif
#if defined(PYKD_LEVEL_avx512)
PYKD_INLINE __m256 half(F32 x, int which) {
  return which ? _mm512_extractf32x8_ps(x.v, 1) : _mm512_castps512_ps256(x.v);
}
#endif

// The sum of all lanes, pairwise: of the two halves, of that sum's halves and so on.
PYKD_INLINE float reduce_add(F32 x) {
#if defined(PYKD_LEVEL_avx512)
  return reduce(_mm256_add_ps(half(x, 0), half(x, 1)), [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
#elif defined(PYKD_LEVEL_avx2)
  return reduce(x.v, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
#else
  return x.v;
#endif
}

PYKD_INLINE float reduce_max(F32 x) {
#if defined(PYKD_LEVEL_avx512)
  return reduce(_mm256_max_ps(half(x, 0), half(x, 1)), [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
#elif defined(PYKD_LEVEL_avx2)
  return reduce(x.v, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
#else
  return x.v;
#endif
}

// e^(x + rest) for x + rest <= 88.7 and a rest that x + rest may swallow, to about 1 ulp; exact 0 for x below -104
// (subnormal results are kept), 0 for -inf, NaN for NaN.
// Cephes' range reduction (n = round(x / ln 2), two-part ln 2) and a degree-6 polynomial on [-ln 2 / 2, ln 2 / 2].
PYKD_INLINE F32 exp(F32 x, F32 rest) {
  const F32 low = set1(-104.0f);
  const F32 clamped = max(low, x);  // max returns its second argument for NaN, which must survive
  const F32 n = round_even(mul(add(clamped, rest), set1(1.44269504088896341f)));
  F32 r = add(fnma(n, set1(0.693359375f), clamped), rest);
  r = fnma(n, set1(-2.12194440e-4f), r);
  F32 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(mul(r, r), p, add(r, set1(1.0f)));
  return select(less(x, low), set1(0.0f), scale_by_power(p, n));
}
PYKD_INLINE F32 exp(F32 x) { return exp(x, set1(0.0f)); }

// e^(x * scale) for x <= 0 and a fixed scale > 0, to about 1 ulp for any scale: softmax with a temperature.
// x * scale * log2(e) = n + r is formed with fused multiply-adds from a two-float constant, so the product is never
// rounded. Results below 2^-126 are between 0 and that, e^-inf is exactly 0; NaN stays NaN.
struct ScaledExp {
  F32 high, low, smallest;
};

PYKD_INLINE ScaledExp scaled_exp(double scale) {
  const double log2_scale = scale * 1.4426950408889634074;
  const float high = static_cast<float>(log2_scale);
  return {set1(high), set1(static_cast<float>(log2_scale - high)), set1(static_cast<float>(-127.0 / log2_scale))};
}

// out[i] = e^(x[i] * scale of constants[i]), in lock step: one exponential is a chain of a dozen dependent operations,
// and a core's schedulers are too small to find the next one behind it, so several are written side by side.
template <int kCount>
PYKD_INLINE void exp(const F32 (&x)[kCount], const ScaledExp* const (&constants)[kCount], F32 (&out)[kCount]) {
#if defined(PYKD_LEVEL_avx512) || defined(PYKD_LEVEL_avx2)
  // n in fractions of 1 / kWidth: `power_of_two` looks 2^(n mod 1) up in one register, which leaves r in
  // [-1 / (2 kWidth), 1 / (2 kWidth)] to a short polynomial: minimax for (2^r - 1) / r, highest power first.
#if defined(PYKD_LEVEL_avx512)
  constexpr float kPolynomial[] = {5.5502135e-2f, 2.4023429e-1f, 6.931472e-1f};  // relative error of 2^r 1.6e-9
#else
  constexpr float kPolynomial[] = {9.617654e-3f, 5.5510595e-2f, 2.402265e-1f, 6.931472e-1f};  // 5e-10
#endif
  constexpr int kTerms = sizeof(kPolynomial) / sizeof(float);
  const F32 magic = set1(12582912.0f / kWidth);  // 1.5 * 2^23 / kWidth: leaves kWidth n, rounded, in the low bits
  F32 clamped[kCount], shifted[kCount], r[kCount], p[kCount];
  for (int i = 0; i < kCount; ++i) clamped[i] = max(constants[i]->smallest, x[i]);  // NaN: max returns the second
  for (int i = 0; i < kCount; ++i) shifted[i] = fma(clamped[i], constants[i]->high, magic);
  for (int i = 0; i < kCount; ++i) r[i] = fms(clamped[i], constants[i]->high, sub(shifted[i], magic));
  for (int i = 0; i < kCount; ++i) r[i] = fma(clamped[i], constants[i]->low, r[i]);
  for (int i = 0; i < kCount; ++i) p[i] = fma(set1(kPolynomial[0]), r[i], set1(kPolynomial[1]));
  for (int k = 2; k < kTerms; ++k)
    for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], r[i], set1(kPolynomial[k]));
  for (int i = 0; i < kCount; ++i) p[i] = mul(p[i], r[i]);
  for (int i = 0; i < kCount; ++i) {
    const F32 power = power_of_two(shifted[i]);
    out[i] = fma(power, p[i], power);
  }
#else
  // Minimax polynomial for 2^-r on [-1/2, 1/2], highest power first; relative error 2e-9.
  constexpr float kPolynomial[] = {
      1.535336196e-4f, -1.339887502e-3f, 9.618436918e-3f, -5.550332367e-2f, 2.402264774e-1f, -6.931471825e-1f, 1.0f};
  const F32 magic = set1(12583039.0f);  // 1.5 * 2^23 + 127: leaves round(n) + 127 in the low bits of the sum
  F32 clamped[kCount], shifted[kCount], r[kCount], p[kCount];
  for (int i = 0; i < kCount; ++i) clamped[i] = max(constants[i]->smallest, x[i]);  // NaN: max returns the second
  for (int i = 0; i < kCount; ++i) shifted[i] = fma(clamped[i], constants[i]->high, magic);
  for (int i = 0; i < kCount; ++i) r[i] = fnma(clamped[i], constants[i]->high, sub(shifted[i], magic));
  for (int i = 0; i < kCount; ++i) r[i] = fnma(clamped[i], constants[i]->low, r[i]);
  for (int i = 0; i < kCount; ++i) p[i] = fma(set1(kPolynomial[0]), r[i], set1(kPolynomial[1]));
  for (int k = 2; k < 7; ++k)
    for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], r[i], set1(kPolynomial[k]));
  for (int i = 0; i < kCount; ++i) out[i] = mul(p[i], low_bits_to_exponent(shifted[i]));
#endif
}

// log(x / y) to about 2 ulp, also where x is close to y; x positive and normal, y in [2^-100, 2^126). Down to 2^-125
// the result is finite and off by no more than 1/2, since x' - y may be flushed to zero there. The difference of the
// bits, rounded to a whole exponent n, is close to log2(x / y): then x' = x * 2^-n is within [2/3, 3/2] of y, x' - y is
// exact, and log(x / y) = n ln 2 + 2 atanh(z), z = (x' - y) / (x' + y), |z| <= 1/5. The polynomial is minimax for
// (2 atanh(z) - 2 z) / z^3 in z^2, with relative error 4e-9 in the whole. Several in lock step, as in `exp` above.
template <int kCount>
PYKD_INLINE void log_quotient(const F32 (&x)[kCount], const F32 (&y)[kCount], F32 (&out)[kCount]) {
  constexpr float kPolynomial[] = {0.30369938f, 0.39957390f, 0.66666948f, 2.0f};
  const F32 unit = set1(8.2629582e-8f);  // ln 2 * 2^-23
  F32 n[kCount], z[kCount], square[kCount], p[kCount];
  for (int i = 0; i < kCount; ++i) n[i] = quotient_exponent(x[i], y[i], &z[i]);
  for (int i = 0; i < kCount; ++i) z[i] = div(sub(z[i], y[i]), add(z[i], y[i]));
  for (int i = 0; i < kCount; ++i) square[i] = mul(z[i], z[i]);
  for (int i = 0; i < kCount; ++i) p[i] = fma(set1(kPolynomial[0]), square[i], set1(kPolynomial[1]));
  for (int k = 2; k < 4; ++k)
    for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], square[i], set1(kPolynomial[k]));
  for (int i = 0; i < kCount; ++i) out[i] = fma(n[i], unit, mul(z[i], p[i]));
}

}  // namespace pykd::PYKD_LEVEL
