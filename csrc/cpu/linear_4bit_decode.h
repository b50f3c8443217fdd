// Decoders: how 32-bit words of codes become weights. Included by linear_4bit.cpp only, in the namespace of its level.
//
// A word holds 8 consecutive k of one output row: byte j has the code of k0 + j in its low and of k0 + 4 + j in its
// high half, so the code of the kk-th k sits at bit `place(kk)`. A `Words` vector holds the words of kWidth rows; the
// lane is the row, so that a sum needs no horizontal additions. A decoder gives the weights before scaling:
//   Symmetric  code - 8          (int4)
//   Shifted    code - zero point (uint4)
//   Table      codebook[code]    (nf4, fp4)
#pragma once

#include "cpu/vec.h"

namespace pykd::PYKD_LEVEL {

constexpr int place(int kk) { return kk < 4 ? 8 * kk : 8 * (kk - 4) + 4; }

PYKD_INLINE uint32_t load_u32(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

#if defined(PYKD_LEVEL_avx512)

struct Words {
  __m512i v;
};
PYKD_INLINE Words load_words(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
PYKD_INLINE F32 load_bytes(const uint8_t* p) {  // kWidth unsigned bytes as floats
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
template <int kk>
PYKD_INLINE __m512i shifted(Words w) {
  return place(kk) == 0 ? w.v : _mm512_srli_epi32(w.v, place(kk));
}

#elif defined(PYKD_LEVEL_avx2)

struct Words {
  __m256i v;
};
PYKD_INLINE Words load_words(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
PYKD_INLINE F32 load_bytes(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
template <int kk>
PYKD_INLINE __m256i shifted(Words w) {
  return place(kk) == 0 ? w.v : _mm256_srli_epi32(w.v, place(kk));
}

#else

struct Words {
  uint32_t v;
};
PYKD_INLINE Words load_words(const uint8_t* p) { return {load_u32(p)}; }
PYKD_INLINE F32 load_bytes(const uint8_t* p) { return {static_cast<float>(*p)}; }

#endif

// Every decoder: `kPlaced` says that the weight comes out multiplied by 2^place(kk) (but by 1 for the highest place),
// so that the activation must be divided by that; `group(zeros)` is told the zero points of the rows of vector i.

struct Table {
  static constexpr bool kPlaced = false;
#if defined(PYKD_LEVEL_avx512)
  __m512 table;
  explicit Table(const float* codebook) : table(_mm512_loadu_ps(codebook)) {}
  template <int kk>
  PYKD_INLINE F32 decode(Words w, int) const {  // the permutation reads the low four bits of each lane only
    return {_mm512_permutexvar_ps(shifted<kk>(w), table)};
  }
#elif defined(PYKD_LEVEL_avx2)
  __m256 low, high;
  explicit Table(const float* codebook) : low(_mm256_loadu_ps(codebook)), high(_mm256_loadu_ps(codebook + 8)) {}
  template <int kk>
  PYKD_INLINE F32 decode(Words w, int) const {  // low three bits choose in both halves, the fourth between them
    const __m256i index = shifted<kk>(w);
    const __m256i fourth = place(kk) == 28 ? w.v : _mm256_slli_epi32(w.v, 28 - place(kk));
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                             _mm256_castsi256_ps(fourth))};
  }
#else
  const float* codebook;
  explicit Table(const float* codebook) : codebook(codebook) {}
  template <int kk>
  PYKD_INLINE F32 decode(Words w, int) const {
    return {codebook[(w.v >> place(kk)) & 15u]};
  }
#endif
  PYKD_INLINE void group(int, const uint8_t*) {}
};

#if defined(PYKD_LEVEL_avx512)

struct Symmetric : Table {
  static constexpr bool kPlaced = false;
  explicit Symmetric(const float*) : Table(levels()) {}
  static const float* levels() {
    alignas(64) static const float values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return values;
  }
};

#elif defined(PYKD_LEVEL_avx2)

// Without shifts: (word & 15 << place) - (8 << place) is (code - 8) * 2^place as an integer, exact as a float. The
// highest place is shifted down, which needs no mask. One and, one subtraction, one conversion: as many as Zen 3 can
// start in the shadow of the one multiply-add that a single row of activations needs.
struct Symmetric {
  static constexpr bool kPlaced = true;
  explicit Symmetric(const float*) {}
  template <int kk>
  PYKD_INLINE F32 decode(Words w, int) const {
    constexpr int bit = place(kk) == 28 ? 0 : place(kk);
    const __m256i code =
        place(kk) == 28 ? _mm256_srli_epi32(w.v, 28) : _mm256_and_si256(w.v, _mm256_set1_epi32(15 << bit));
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(8 << bit)))};
  }
  PYKD_INLINE void group(int, const uint8_t*) {}
};

#else

struct Symmetric {
  static constexpr bool kPlaced = false;
  explicit Symmetric(const float*) {}
  template <int kk>
  PYKD_INLINE F32 decode(Words w, int) const {
    return {static_cast<float>(static_cast<int>((w.v >> place(kk)) & 15u) - 8)};
  }
  PYKD_INLINE void group(int, const uint8_t*) {}
};

#endif

template <int NV>
struct Shifted {
  static constexpr bool kPlaced = false;
  F32 zero[NV];
  PYKD_INLINE void group(int i, const uint8_t* zeros) { zero[i] = load_bytes(zeros); }
#if defined(PYKD_LEVEL_avx512)
  Table code;  // one permutation instead of a mask and a conversion
  explicit Shifted(const float*) : code(numbers()) {}
  static const float* numbers() {
    alignas(64) static const float values[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return values;
  }
  template <int kk>
  PYKD_INLINE F32 decode(Words w, int i) const {
    return sub(code.template decode<kk>(w, i), zero[i]);
  }
#else
  explicit Shifted(const float*) {}
  template <int kk>
  PYKD_INLINE F32 decode(Words w, int i) const {
#if defined(PYKD_LEVEL_avx2)
    return sub({_mm256_cvtepi32_ps(_mm256_and_si256(shifted<kk>(w), _mm256_set1_epi32(15)))}, zero[i]);
#else
    return sub({static_cast<float>((w.v >> place(kk)) & 15u)}, zero[i]);
#endif
  }
#endif
};

}  // namespace pykd::PYKD_LEVEL
