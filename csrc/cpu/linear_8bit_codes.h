// Integer verbs of linear_8bit: sums of products of int8 codes, four k at a time. Included by linear_8bit.cpp only, in
// the namespace of its level.
//
//   I32    kWidth int32 sums, one per output
//   Codes  the weights of kWidth outputs x 4 k, as packed: the four bytes of a 32-bit lane belong to one output
//   Quad   four activations of a row, in every lane
//   dot    sum + codes * quad, exact: modulo 2^32, and the result fits for in_features <= kLinear8bitFeatures
//
// avx512: vpdpbusd multiplies unsigned by signed bytes, so that activations are stored plus 128, and sums start at
// minus 128 times the sum of their output's weights, which is packed along.
//
// avx2: |w| (at most 128) times sign(w) * a (at most 127): vpmaddubsw adds two products, at most 2 * 128 * 127 =
// 32,512, and cannot saturate; vpmaddwd by ones and vpaddd widen the sums. That is vpsignb, vpmaddubsw, vpmaddwd,
// vpaddd: 4 operations for 32 products. Sign-extended words (vpmaddwd and vpaddd, each for 16 products) need the same
// 4, plus the widening of every weight for every panel and twice the broadcasts. In the first-level cache of a Zen 3,
// billions of products a second of one core: 74 this way, 60 with words, 50 with float32 multiply-adds.
#pragma once

#include "cpu/vec.h"

namespace pykd::PYKD_LEVEL {

PYKD_INLINE int32_t load_four_bytes(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

#if defined(PYKD_LEVEL_avx512)

constexpr int kCodeRows = 12;  // rows of the register tile: 2 x 12 accumulators of 32 registers
constexpr int code_vectors(int) { return 2; }

struct I32 {
  __m512i v;
};
struct Codes {
  __m512i v;
};
struct Quad {
  __m512i v;
};
PYKD_INLINE I32 zero_i32() { return {_mm512_setzero_si512()}; }
PYKD_INLINE I32 start_sum(const uint8_t* starts) { return {_mm512_loadu_si512(starts)}; }
PYKD_INLINE Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
PYKD_INLINE Quad load_quad(const uint8_t* p) { return {_mm512_set1_epi32(load_four_bytes(p))}; }
PYKD_INLINE I32 dot(I32 sum, const Codes& w, Quad a) { return {_mm512_dpbusd_epi32(sum.v, a.v, w.v)}; }
PYKD_INLINE F32 to_f32(I32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
template <int kk>  // the weights of the kk-th k as floats
PYKD_INLINE F32 decode(const Codes& w) {
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(kk == 3 ? w.v : _mm512_slli_epi32(w.v, 24 - 8 * kk), 24))};
}
PYKD_INLINE I32 max_magnitude(I32 best, F32 x) {  // of the bits without the sign: infinity and NaN are the largest
  return {_mm512_max_epi32(best.v, _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff)))};
}
PYKD_INLINE I32 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
PYKD_INLINE void store_i32(int32_t* p, I32 x) { _mm512_storeu_si512(p, x.v); }
PYKD_INLINE void store_activations(uint8_t* p, F32 x) {
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
}

#elif defined(PYKD_LEVEL_avx2)

constexpr int kCodeRows = 4;  // 2 x 4 accumulators, 2 weights and their magnitudes, a quad, a product, ones
constexpr int code_vectors(int rows) { return rows <= 2 ? 4 : 2; }

struct I32 {
  __m256i v;
};
struct Codes {
  __m256i v, magnitude;
};
struct Quad {
  __m256i v;
};
PYKD_INLINE I32 zero_i32() { return {_mm256_setzero_si256()}; }
PYKD_INLINE I32 start_sum(const uint8_t*) { return zero_i32(); }
PYKD_INLINE Codes load_codes(const uint8_t* p) {
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {codes, _mm256_abs_epi8(codes)};
}
PYKD_INLINE Quad load_quad(const uint8_t* p) { return {_mm256_set1_epi32(load_four_bytes(p))}; }
PYKD_INLINE I32 dot(I32 sum, const Codes& w, Quad a) {
  const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(a.v, w.v));
  __m256i result = _mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  asm volatile("" : "+x"(result));  // product after product: GCC 12 else starts them all, and runs out of registers
  return {result};
}
PYKD_INLINE F32 to_f32(I32 x) { return {_mm256_cvtepi32_ps(x.v)}; }
template <int kk>
PYKD_INLINE F32 decode(const Codes& w) {
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(kk == 3 ? w.v : _mm256_slli_epi32(w.v, 24 - 8 * kk), 24))};
}
PYKD_INLINE I32 max_magnitude(I32 best, F32 x) {
  return {_mm256_max_epi32(best.v, _mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7fffffff)))};
}
PYKD_INLINE I32 load_i32(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
PYKD_INLINE void store_i32(int32_t* p, I32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }
PYKD_INLINE void store_activations(uint8_t* p, F32 x) {
  const __m256i words = _mm256_cvtps_epi32(x.v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}

#else  // scalar

constexpr int kCodeRows = 4;
constexpr int code_vectors(int) { return 2; }

struct I32 {
  int32_t v;
};
struct Codes {
  int8_t v[4];
};
struct Quad {
  int8_t v[4];
};
PYKD_INLINE I32 zero_i32() { return {0}; }
PYKD_INLINE I32 start_sum(const uint8_t*) { return zero_i32(); }
PYKD_INLINE Codes load_codes(const uint8_t* p) {
  Codes codes;
  std::memcpy(codes.v, p, sizeof codes.v);
  return codes;
}
PYKD_INLINE Quad load_quad(const uint8_t* p) {
  Quad quad;
  std::memcpy(quad.v, p, sizeof quad.v);
  return quad;
}
PYKD_INLINE I32 dot(I32 sum, const Codes& w, Quad a) {
  return {sum.v + w.v[0] * a.v[0] + w.v[1] * a.v[1] + w.v[2] * a.v[2] + w.v[3] * a.v[3]};
}
PYKD_INLINE F32 to_f32(I32 x) { return {static_cast<float>(x.v)}; }
template <int kk>
PYKD_INLINE F32 decode(const Codes& w) {
  return {static_cast<float>(w.v[kk])};
}
PYKD_INLINE I32 max_magnitude(I32 best, F32 x) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(x.v) & 0x7fffffffu);
  return {bits > best.v ? bits : best.v};
}
PYKD_INLINE I32 load_i32(const int32_t* p) { return {*p}; }
PYKD_INLINE void store_i32(int32_t* p, I32 x) { *p = x.v; }
PYKD_INLINE void store_activations(uint8_t* p, F32 x) { *p = static_cast<uint8_t>(static_cast<int8_t>(x.v)); }

#endif

// --- rounding of activations ----------------------------------------------------------------------------------------

// to[k / 4 * step + k % 4] = round(x[k] / scale) of [0, padded), x being 0 from `count` on, where scale = absmax / 127
// is returned: what quantize_rows in pykd/ops/linear_8bit.py does, to the bit, so that it divides and does not multiply
// by a reciprocal. A row with NaN or infinity has the scale NaN.
template <class T>
float round_row(const T* x, int64_t count, int64_t padded, int64_t step, uint8_t* to) {
  I32 best = zero_i32();
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) best = max_magnitude(best, load(x + k));
  if (k < count) best = max_magnitude(best, load_n(x + k, count - k, 0.0f));
  int32_t lanes[kWidth], largest = 0;
  store_i32(lanes, best);
  for (const int32_t lane : lanes) largest = lane > largest ? lane : largest;
  const bool finite = largest < 0x7f800000;
  const float scale = finite ? bits_to_float(static_cast<uint32_t>(largest)) / 127.0f : bits_to_float(0x7fc00000u);
  const F32 divisor = set1(scale > 0.0f ? scale : 1.0f);
  constexpr int kChunk = 16;
  uint8_t bytes[kChunk];
  for (k = 0; k < padded; k += kChunk) {
    for (int j = 0; j < kChunk; j += kWidth) {
      const int64_t at = k + j, left = at < count ? count - at : 0;
      F32 value = set1(0.0f);
      if (finite && left > 0) value = div(left >= kWidth ? load(x + at) : load_n(x + at, left, 0.0f), divisor);
      value = min(max(value, set1(-127.0f)), set1(127.0f));
      store_activations(bytes + j, round_even(value));
    }
    for (int j = 0; j < kChunk && k + j < padded; j += 4) std::memcpy(to + (k + j) / 4 * step, bytes + j, 4);
  }
  return scale;
}

}  // namespace pykd::PYKD_LEVEL
