// Rows of activations as int8: rounding, and the 32-bit sums of products that linear_8bit and w4a8 share. Included in
// the namespace of a level.
//
//   I32   kWidth int32
//   Quad  four activations of a row, in every 32-bit lane
#pragma once

#include "cpu/vec.h"

namespace pykd::PYKD_LEVEL {

PYKD_INLINE int32_t load_four_bytes(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

#if defined(PYKD_LEVEL_avx512)

struct I32 {
  __m512i v;
};
struct Quad {
  __m512i v;
};
PYKD_INLINE I32 zero_i32() { return {_mm512_setzero_si512()}; }
PYKD_INLINE I32 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
PYKD_INLINE void store_i32(int32_t* p, I32 x) { _mm512_storeu_si512(p, x.v); }
PYKD_INLINE F32 to_f32(I32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
PYKD_INLINE Quad load_quad(const uint8_t* p) { return {_mm512_set1_epi32(load_four_bytes(p))}; }
PYKD_INLINE I32 max_magnitude(I32 best, F32 x) {  // of the bits without the sign: infinity and NaN are the largest
  return {_mm512_max_epi32(best.v, _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff)))};
}
PYKD_INLINE int32_t largest(I32 x) { return _mm512_reduce_max_epi32(x.v); }
PYKD_INLINE void store_int8(uint8_t* p, F32 x) {  // whole numbers
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}

#elif defined(PYKD_LEVEL_avx2)

struct I32 {
  __m256i v;
};
struct Quad {
  __m256i v;
};
PYKD_INLINE I32 zero_i32() { return {_mm256_setzero_si256()}; }
PYKD_INLINE I32 load_i32(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
PYKD_INLINE void store_i32(int32_t* p, I32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }
PYKD_INLINE F32 to_f32(I32 x) { return {_mm256_cvtepi32_ps(x.v)}; }
PYKD_INLINE Quad load_quad(const uint8_t* p) { return {_mm256_set1_epi32(load_four_bytes(p))}; }
PYKD_INLINE I32 max_magnitude(I32 best, F32 x) {
  return {_mm256_max_epi32(best.v, _mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7fffffff)))};
}
PYKD_INLINE void store_int8(uint8_t* p, F32 x) {
  const __m256i words = _mm256_cvtps_epi32(x.v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}

PYKD_INLINE int32_t largest(I32 x) {
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

#else  // scalar

struct I32 {
  int32_t v;
};
struct Quad {
  int8_t v[4];
};
PYKD_INLINE I32 zero_i32() { return {0}; }
PYKD_INLINE I32 load_i32(const int32_t* p) { return {*p}; }
PYKD_INLINE void store_i32(int32_t* p, I32 x) { *p = x.v; }
PYKD_INLINE F32 to_f32(I32 x) { return {static_cast<float>(x.v)}; }
PYKD_INLINE Quad load_quad(const uint8_t* p) {
  Quad quad;
  std::memcpy(quad.v, p, sizeof quad.v);
  return quad;
}
PYKD_INLINE I32 max_magnitude(I32 best, F32 x) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(x.v) & 0x7fffffffu);
  return {bits > best.v ? bits : best.v};
}
PYKD_INLINE int32_t largest(I32 x) { return x.v; }
PYKD_INLINE void store_int8(uint8_t* p, F32 x) { *p = static_cast<uint8_t>(static_cast<int8_t>(x.v)); }

#endif

// --- rounding -------------------------------------------------------------------------------------------------------

// absmax / 127 of x[0, count): what int8 codes of x are multiples of. NaN when x holds NaN or infinity.
template <class T>
float int8_scale(const T* x, int64_t count) {
  I32 best = zero_i32();
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) best = max_magnitude(best, load(x + k));
  if (k < count) best = max_magnitude(best, load_n(x + k, count - k, 0.0f));
  const int32_t bits = largest(best);
  return bits < 0x7f800000 ? bits_to_float(static_cast<uint32_t>(bits)) / 127.0f : bits_to_float(0x7fc00000u);
}

constexpr int kChunk = 16;  // codes that are rounded at a time, a multiple of every kWidth

// bytes = round(x[k ... k + kChunk) / scale), x being 0 from `count` on: what quantize_rows in pykd/ops/linear_8bit.py
// does, to the bit, so that it divides and does not multiply by a reciprocal. Zeros under the scales 0 and NaN. Codes
// are moved by `zero`, also those beyond `count`, and cut off at -127 and 127.
template <class T>
PYKD_INLINE void round_chunk(const T* x, int64_t k, int64_t count, float scale, uint8_t* bytes, float zero = 0.0f) {
  const F32 divisor = set1(scale > 0.0f ? scale : 1.0f);
  for (int j = 0; j < kChunk; j += kWidth) {
    const int64_t left = k + j < count ? count - k - j : 0;
    F32 value = set1(0.0f);
    if (scale > 0.0f && left > 0)
      value = div(left >= kWidth ? load(x + k + j) : load_n(x + k + j, left, 0.0f), divisor);
    const F32 whole = round_even(min(max(value, set1(-127.0f - zero)), set1(127.0f - zero)));
    store_int8(bytes + j, add(whole, set1(zero)));
  }
}

}  // namespace pykd::PYKD_LEVEL
