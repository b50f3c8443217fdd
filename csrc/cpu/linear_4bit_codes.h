// Integer verbs of w4a8: sums of products of 4-bit weights and int8 activations. Included by linear_4bit_rounded.cpp
// only, in the namespace of its level.
//
//   Sum      sums of products, for kWidth outputs
//   Nibbles  codes 0..15 of kWidth outputs x 4 k; `low` are k0 ... k0 + 3 of a word, `high` k0 + 4 ... k0 + 7
//   dot      sum + nibbles * quad, exact
//
// Sums start at -8 * (sum of the row's activations): so a code stands for code - 8, without an operation per weight.
//
// avx512: vpdpbusd, unsigned codes by signed activations, into 32 bits.
//
// avx2: vpmaddubsw adds two products, at most 2 * 15 * 127, into 16 bits, and vpaddw adds those: 2 operations for 32
// products, where widening each sum (linear_8bit) needs 4. The sum of a lane, that of 2 products in 4 k, is right
// modulo 2^16 whatever it passes through; of kFoldAt = 64 k it is at most 32 * 8 * 127 = 32,512 and so right. Then
// vpmaddwd by ones widens it.
#pragma once

#include "cpu/int8_rows.h"
#include "cpu/linear_4bit_decode.h"
#include "cpu/vec.h"

namespace pykd::PYKD_LEVEL {

#if defined(PYKD_LEVEL_avx512)

constexpr int kCodeRows = 6;  // 2 x 6 integer and 2 x 6 float accumulators, weights, mask: 32 registers
constexpr int code_vectors(int) { return 2; }
constexpr int64_t kFoldAt = 65536;  // k after which sums are folded into floats, or at the end of a group
constexpr int kEights = 4;          // 8 k at a time without a branch: a group of 32

struct Sum {
  __m512i v;
};
struct Nibbles {
  __m512i v;
};
PYKD_INLINE Sum start_sum(int32_t start) { return {_mm512_set1_epi32(start)}; }
PYKD_INLINE Nibbles low(Words w) { return {_mm512_and_si512(w.v, _mm512_set1_epi8(15))}; }
PYKD_INLINE Nibbles high(Words w) { return {_mm512_and_si512(_mm512_srli_epi16(w.v, 4), _mm512_set1_epi8(15))}; }
PYKD_INLINE Sum dot(Sum sum, Nibbles w, Quad a) { return {_mm512_dpbusd_epi32(sum.v, w.v, a.v)}; }
PYKD_INLINE Words in_order(Words w) { return w; }
PYKD_INLINE F32 to_f32(Sum sum) { return {_mm512_cvtepi32_ps(sum.v)}; }

#elif defined(PYKD_LEVEL_avx2)

constexpr int kCodeRows = 6;  // 2 x 6 accumulators, 2 weights, a quad, a product; the float totals are in memory
constexpr int code_vectors(int rows) { return rows <= 2 ? 4 : 2; }
constexpr int64_t kFoldAt = kLinear4bitFold;
constexpr int kEights = 1;

struct Sum {
  __m256i v;
};
struct Nibbles {
  __m256i v;
};
PYKD_INLINE Sum start_sum(int32_t start) { return {_mm256_set1_epi32(start)}; }
PYKD_INLINE Nibbles low(Words w) { return {_mm256_and_si256(w.v, _mm256_set1_epi8(15))}; }
PYKD_INLINE Nibbles high(Words w) { return {_mm256_and_si256(_mm256_srli_epi16(w.v, 4), _mm256_set1_epi8(15))}; }
PYKD_INLINE Sum dot(Sum sum, Nibbles w, Quad a) {
  __m256i result = _mm256_add_epi16(sum.v, _mm256_maddubs_epi16(w.v, a.v));
  asm volatile("" : "+x"(result));  // product after product: GCC 12 else starts them all, and runs out of registers
  return {result};
}
PYKD_INLINE Words in_order(Words w) {  // high nibbles after the products of the low ones, for the same reason
  asm volatile("" : "+x"(w.v));
  return w;
}
PYKD_INLINE F32 to_f32(Sum sum) { return {_mm256_cvtepi32_ps(_mm256_madd_epi16(sum.v, _mm256_set1_epi16(1)))}; }

#else  // scalar

constexpr int kCodeRows = 4;
constexpr int code_vectors(int) { return 2; }
constexpr int64_t kFoldAt = 65536;
constexpr int kEights = 1;

struct Sum {
  int32_t v;
};
struct Nibbles {
  uint32_t v;
};
PYKD_INLINE Sum start_sum(int32_t start) { return {start}; }
PYKD_INLINE Nibbles low(Words w) { return {w.v & 0x0f0f0f0fu}; }
PYKD_INLINE Nibbles high(Words w) { return {w.v >> 4 & 0x0f0f0f0fu}; }
PYKD_INLINE Sum dot(Sum sum, Nibbles w, Quad a) {
  for (int j = 0; j < 4; ++j) sum.v += static_cast<int32_t>(w.v >> 8 * j & 15u) * a.v[j];
  return sum;
}
PYKD_INLINE Words in_order(Words w) { return w; }
PYKD_INLINE F32 to_f32(Sum sum) { return {static_cast<float>(sum.v)}; }

#endif

// Sums of rounded activations, of kChunk at a time. `start` is the word in every lane of a sum that starts.
#if defined(PYKD_LEVEL_avx512)

struct CodeSums {
  __m128i lanes = _mm_setzero_si128();
  PYKD_INLINE void add(const uint8_t* codes) {
    lanes = _mm_dpbusd_epi32(lanes, _mm_set1_epi8(1), _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  }
  PYKD_INLINE int32_t total() const {
    const __m128i two = _mm_add_epi32(lanes, _mm_shuffle_epi32(lanes, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }
  PYKD_INLINE int32_t start() const { return -8 * total(); }
};

#else

struct CodeSums {
  int32_t first = 0, second = 0;  // of k % 4 < 2, and of the others
  PYKD_INLINE void add(const uint8_t* codes) {
    for (int k = 0; k < kChunk; k += 4) {
      first += static_cast<int8_t>(codes[k]) + static_cast<int8_t>(codes[k + 1]);
      second += static_cast<int8_t>(codes[k + 2]) + static_cast<int8_t>(codes[k + 3]);
    }
  }
  PYKD_INLINE int32_t total() const { return first + second; }
  PYKD_INLINE int32_t start() const {
#if defined(PYKD_LEVEL_avx2)
    const uint32_t high = static_cast<uint32_t>(-8 * second) << 16;
    return static_cast<int32_t>(high | (static_cast<uint32_t>(-8 * first) & 0xffffu));
#else
    return -8 * total();
#endif
  }
};

#endif

}  // namespace pykd::PYKD_LEVEL
