// Integer verbs of linear_8bit: sums of products of int8 codes, four k at a time. Included by linear_8bit.cpp only, in
// the namespace of its level.
//
//   I32    kWidth int32 sums, one per output
//   Codes  the weights of kWidth outputs x 4 k, as packed: the four bytes of a 32-bit lane belong to one output
//   Quad   four activations of a row, in every lane, each xor kCodeFlip
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

#include "cpu/int8_rows.h"
#include "cpu/vec.h"

namespace pykd::PYKD_LEVEL {

#if defined(PYKD_LEVEL_avx512)

constexpr uint32_t kCodeFlip = 0x80808080u;
constexpr int kCodeRows = 12;  // rows of the register tile: 2 x 12 accumulators of 32 registers
constexpr int code_vectors(int) { return 2; }

struct Codes {
  __m512i v;
};
PYKD_INLINE I32 start_sum(const uint8_t* starts) { return {_mm512_loadu_si512(starts)}; }
PYKD_INLINE Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
PYKD_INLINE I32 dot(I32 sum, const Codes& w, Quad a) { return {_mm512_dpbusd_epi32(sum.v, a.v, w.v)}; }
template <int kk>  // the weights of the kk-th k as floats
PYKD_INLINE F32 decode(const Codes& w) {
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(kk == 3 ? w.v : _mm512_slli_epi32(w.v, 24 - 8 * kk), 24))};
}

#elif defined(PYKD_LEVEL_avx2)

constexpr uint32_t kCodeFlip = 0;
constexpr int kCodeRows = 4;  // 2 x 4 accumulators, 2 weights and their magnitudes, a quad, a product, ones
constexpr int code_vectors(int rows) { return rows <= 2 ? 4 : 2; }

struct Codes {
  __m256i v, magnitude;
};
PYKD_INLINE I32 start_sum(const uint8_t*) { return zero_i32(); }
PYKD_INLINE Codes load_codes(const uint8_t* p) {
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {codes, _mm256_abs_epi8(codes)};
}
PYKD_INLINE I32 dot(I32 sum, const Codes& w, Quad a) {
  const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(a.v, w.v));
  __m256i result = _mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  asm volatile("" : "+x"(result));  // product after product: GCC 12 else starts them all, and runs out of registers
  return {result};
}
template <int kk>
PYKD_INLINE F32 decode(const Codes& w) {
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(kk == 3 ? w.v : _mm256_slli_epi32(w.v, 24 - 8 * kk), 24))};
}

#else  // scalar

constexpr uint32_t kCodeFlip = 0;
constexpr int kCodeRows = 4;
constexpr int code_vectors(int) { return 2; }

struct Codes {
  int8_t v[4];
};
PYKD_INLINE I32 start_sum(const uint8_t*) { return zero_i32(); }
PYKD_INLINE Codes load_codes(const uint8_t* p) {
  Codes codes;
  std::memcpy(codes.v, p, sizeof codes.v);
  return codes;
}
PYKD_INLINE I32 dot(I32 sum, const Codes& w, Quad a) {
  return {sum.v + w.v[0] * a.v[0] + w.v[1] * a.v[1] + w.v[2] * a.v[2] + w.v[3] * a.v[3]};
}
template <int kk>
PYKD_INLINE F32 decode(const Codes& w) {
  return {static_cast<float>(w.v[kk])};
}

#endif

// --- rounding of activations ----------------------------------------------------------------------------------------

// to[k / 4 * step + k % 4] = round(x[k] / scale) + zero, within -127..127, xor kCodeFlip of [0, padded), x being 0 from
// `count` on. Returned is the scale: `given`, or for 0 absmax / 127. A row with NaN or infinity has the scale NaN.
template <class T>
float round_row(const T* x, int64_t count, int64_t padded, int64_t step, uint8_t* to, float given, float zero) {
  const float own = int8_scale(x, count);
  const float scale = given > 0.0f && own == own ? given : own;
  uint8_t bytes[kChunk];
  for (int64_t k = 0; k < padded; k += kChunk) {
    round_chunk(x, k, count, scale, bytes, zero);
    for (int j = 0; j < kChunk && k + j < padded; j += 4) {
      const uint32_t word = static_cast<uint32_t>(load_four_bytes(bytes + j)) ^ kCodeFlip;
      std::memcpy(to + (k + j) / 4 * step, &word, 4);
    }
  }
  return scale;
}

}  // namespace pykd::PYKD_LEVEL
