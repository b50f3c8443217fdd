// kWidth x kWidth transposition of floats in registers. Only included by the units of one instruction-set level each.
#pragma once

#include "cpu/vec.h"

namespace pykd::PYKD_LEVEL {

#if defined(PYKD_LEVEL_avx512)

PYKD_INLINE void transpose(F32* rows) {
  __m512 t[16], u[16];
  for (int i = 0; i < 8; ++i) {  // pairs of rows: 2 x 2 blocks
    t[2 * i] = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // quads of rows: u[i + j], lane group g = column 4 g + j of rows i..i+3
    u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
  for (int j = 0; j < 4; ++j) {                                        // 4 x 4 exchange of 128-bit lane groups
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x44);       // rows 0-7, columns j and 4 + j
    const __m512 b = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x44);  // rows 8-15
    const __m512 c = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xee);       // rows 0-7, columns 8 + j and 12 + j
    const __m512 d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xee);  // rows 8-15
    rows[j] = {_mm512_shuffle_f32x4(a, b, 0x88)};
    rows[4 + j] = {_mm512_shuffle_f32x4(a, b, 0xdd)};
    rows[8 + j] = {_mm512_shuffle_f32x4(c, d, 0x88)};
    rows[12 + j] = {_mm512_shuffle_f32x4(c, d, 0xdd)};
  }
}

#elif defined(PYKD_LEVEL_avx2)

PYKD_INLINE void transpose(F32* rows) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    rows[j] = {_mm256_permute2f128_ps(u[j], u[4 + j], 0x20)};
    rows[4 + j] = {_mm256_permute2f128_ps(u[j], u[4 + j], 0x31)};
  }
}

#else

PYKD_INLINE void transpose(F32*) {}

#endif

}  // namespace pykd::PYKD_LEVEL
