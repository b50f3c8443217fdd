// Linear layer over a pruned int8 weight, activations rounded to int8 with a scale per row (sparse w8a8), the weight in
// a panels pack of kCodes or, at the avx512 level, kWindows (csrc/cpu/sparse_panels.h). The result is that of
// linear_8bit, to the bit.
//
// Below AVX-512 (which has cpu/sparse_8bit_windows.h):
// Codes of x are transposed into panels of int16: panel[tile][column][P], P = kVectors * kPairRows. Two kept weights of
// a row, at any two columns, meet two vectors of a panel, which are interleaved so that one instruction multiplies and
// adds pairs of int16. For 2 weights x 16 rows at 8 lanes that is 2 loads, 2 shuffles, 2 multiply-adds and 2 additions:
// 21 products a cycle on four pipes, where the dense kernel's pairs of bytes reach 18 (measured on a Zen 3) and float
// panels 13. A panel is stored in the order that the interleaving undoes: see `store_pair`.
#include "cpu/int8_rows.h"
#include "cpu/linear_rows.h"
#include "cpu/vec.h"
#include "ops.h"

#if defined(PYKD_LEVEL_avx512)
#include "cpu/sparse_8bit_windows.h"
#else
#include "cpu/sparse_stream.h"
#include "cpu/transpose.h"

namespace pykd::PYKD_LEVEL {
namespace {

constexpr int64_t kPairRows = 2 * kWidth;  // rows of x in a vector of int16
constexpr int kVectors = 2;                // vectors in the widest panel: 2 x 2 x 2 sums, 4 temporaries, a weight

struct PairSum {
  I32 low, high;  // rows [0, kWidth) and [kWidth, 2 kWidth)
};

#if defined(PYKD_LEVEL_avx2)

PYKD_INLINE void store_pair(int16_t* to, F32 low, F32 high) {
  const __m256i codes = _mm256_packs_epi32(_mm256_cvtps_epi32(low.v), _mm256_cvtps_epi32(high.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), codes);
}
PYKD_INLINE void multiply_pair(PairSum& sum, const int16_t* first, const int16_t* second, int32_t weights) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
  const __m256i w = _mm256_set1_epi32(weights);
  __m256i low = _mm256_add_epi32(sum.low.v, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), w));
  asm volatile("" : "+x"(low));  // product after product: GCC 12 else starts them all, and spills the sums
  __m256i high = _mm256_add_epi32(sum.high.v, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), w));
  asm volatile("" : "+x"(high));
  sum.low = {low};
  sum.high = {high};
}
PYKD_INLINE I32 add_i32(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }

#else  // scalar

PYKD_INLINE void store_pair(int16_t* to, F32 low, F32 high) {
  to[0] = static_cast<int16_t>(low.v);
  to[1] = static_cast<int16_t>(high.v);
}
PYKD_INLINE void multiply_pair(PairSum& sum, const int16_t* first, const int16_t* second, int32_t weights) {
  int16_t w[2];
  std::memcpy(w, &weights, sizeof w);
  sum.low.v += w[0] * first[0] + w[1] * second[0];
  sum.high.v += w[0] * first[1] + w[1] * second[1];
}
PYKD_INLINE I32 add_i32(I32 a, I32 b) { return {a.v + b.v}; }

#endif

// --- one stream over one tile of one panel ---------------------------------------------------------------------------

template <int NV>
PYKD_INLINE void stream_codes(const uint8_t* at, const int16_t* panel, int32_t* sums) {
  constexpr int64_t kPanel = NV * kPairRows;
  constexpr int kChains = NV == 1 ? 2 : 1;  // sums of a row: narrow panels need more of them
  for (;;) {
    uint32_t groups, pairs;
    read_two(at, groups, pairs);
    if (groups == 0) return;
    for (uint32_t pair = 0; pair < pairs; ++pair) {
      uint32_t row[2];
      read_two(at, row[0], row[1]);
      PairSum sum[2][kChains][NV];
      for (auto& side : sum)
        for (auto& chain : side)
          for (PairSum& vector : chain) vector = {zero_i32(), zero_i32()};
      const auto step = [&](int chain) {
#pragma GCC unroll 2
        for (int side = 0; side < 2; ++side) {
          const int32_t weights = load_four_bytes(at + 4 + 4 * side);
          const int16_t* first = panel + at[2 * side] * kPanel;
          const int16_t* second = panel + at[2 * side + 1] * kPanel;
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v)
            multiply_pair(sum[side][chain][v], first + v * kPairRows, second + v * kPairRows, weights);
        }
        at += group_bytes(kCodes);
      };
      uint32_t group = 0;
      for (; kChains == 2 && group + 2 <= groups; group += 2) {
        step(0);
        step(kChains - 1);
      }
      for (; group < groups; ++group) step(0);
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side)
        for (int v = 0; v < NV; ++v) {
          PairSum total = sum[side][0][v];
          if (kChains == 2) {
            total.low = add_i32(total.low, sum[side][kChains - 1][v].low);
            total.high = add_i32(total.high, sum[side][kChains - 1][v].high);
          }
          int32_t* target = sums + row[side] * kPanel + v * kPairRows;
          store_i32(target, add_i32(total.low, load_i32(target)));
          store_i32(target + kWidth, add_i32(total.high, load_i32(target + kWidth)));
        }
    }
  }
}

// The same for a single row of x.
void stream_row(const uint8_t* at, const int16_t* x, int32_t* sums) {
  for (;;) {
    uint32_t groups, pairs;
    read_two(at, groups, pairs);
    if (groups == 0) return;
    for (uint32_t pair = 0; pair < pairs; ++pair) {
      uint32_t a, b;
      read_two(at, a, b);
      int32_t sum[4] = {sums[a], 0, sums[b], 0};
      for (uint32_t group = 0; group < groups; ++group, at += group_bytes(kCodes)) {
        int16_t value[4];
        std::memcpy(value, at + 4, sizeof value);
#pragma GCC unroll 4
        for (int slot = 0; slot < 4; ++slot) sum[slot] += value[slot] * x[at[slot]];
      }
      sums[a] = sum[0] + sum[1];
      sums[b] = sum[2] + sum[3];
    }
  }
}

// --- panels of x in, rows of y out -----------------------------------------------------------------------------------

int64_t panel_width(int64_t rows, int64_t row) {
  if (rows == 1) return 1;
  return rows - row > kPairRows ? kVectors * kPairRows : kPairRows;
}

struct Call {
  const Sparse8bitArgs& args;
  Pack pack;
  float* row_scales;  // [rows]
  int16_t* panels;    // [rows, padded to panels][panel_columns]
  int32_t* sums;      // [threads][kPanelChunk + 1][kPanelMaxWidth]

  explicit Call(const Sparse8bitArgs& a)
      : args(a),
        pack(a.pack),
        row_scales(a.scratch),
        panels(reinterpret_cast<int16_t*>(a.scratch + a.rows)),
        sums(reinterpret_cast<int32_t*>(a.scratch + a.rows +
                                        ((a.rows + kPanelMaxWidth) * pack.panel_columns() + 1) / 2)) {}
};

// block[i] = codes of column + i of the rows [row, row + kWidth), as floats; 0 for rows past the last.
template <class T>
PYKD_INLINE void round_block(const Call& c, int64_t row, int64_t column, int64_t columns, F32* block) {
  float scales[kWidth];
  const T* x = static_cast<const T*>(c.args.x) + column;
  for (int i = 0; i < kWidth; ++i) {
    const bool exists = row + i < c.args.rows;
    const T* from = exists ? x + (row + i) * c.args.x_stride : nullptr;
    block[i] = !exists ? set1(0.0f) : columns == kWidth ? load(from) : load_n(from, columns, 0.0f);
    scales[i] = exists && c.row_scales[row + i] > 0.0f ? c.row_scales[row + i] : 1.0f;
  }
  transpose(block);
  const F32 divisor = load(scales);
  for (int i = 0; i < kWidth; ++i) block[i] = round_even(min(max(div(block[i], divisor), set1(-127.0f)), set1(127.0f)));
}

template <class T>
void fill_panel(const Call& c, int64_t row, int64_t width, int64_t column0, int64_t column1, int16_t* panel) {
  for (int64_t lane = 0; lane < width; lane += kPairRows)
    for (int64_t column = column0; column < column1; column += kWidth) {
      const int64_t columns = column1 - column < kWidth ? column1 - column : kWidth;
      F32 low[kWidth], high[kWidth];
      round_block<T>(c, row + lane, column, columns, low);
      round_block<T>(c, row + lane + kWidth, column, columns, high);
      for (int64_t i = 0; i < columns; ++i) store_pair(panel + (column - column0 + i) * width + lane, low[i], high[i]);
    }
}

template <class T>
void fill_row(const Call& c, int64_t column0, int64_t column1, int16_t* to) {
  const T* x = static_cast<const T*>(c.args.x);
  uint8_t bytes[kChunk];
  for (int64_t column = column0; column < column1; column += kChunk) {
    round_chunk(x, column, column1, c.row_scales[0], bytes);
    for (int i = 0; i < kChunk && column + i < column1; ++i) to[column - column0 + i] = static_cast<int8_t>(bytes[i]);
  }
}

template <class T>
void fill_tiles(const Call& c, int64_t first, int64_t last) {
  const int64_t step = c.pack.header.tile, in = c.args.in_features;
  int64_t width = 0;
  for (int64_t row = 0; row < c.args.rows; row += width) {
    width = panel_width(c.args.rows, row);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tile * step, end = begin + step < in ? begin + step : in;
      int16_t* panel = c.panels + row * c.pack.panel_columns() + tile * (step + 1) * width;
      width == 1 ? fill_row<T>(c, begin, end, panel) : fill_panel<T>(c, row, width, begin, end, panel);
      std::memset(panel + step * width, 0, static_cast<size_t>(width) * 2);  // where fillers point
    }
  }
}

// sums[chunk row][width] * row scale * scale + bias -> y
template <class T>
void drain_panel(const Call& c, int64_t row, int64_t width, int64_t column, int64_t count, const int32_t* sums) {
  alignas(64) float total[kWidth * kPanelChunk];
  const int64_t lanes = width < kWidth ? width : kWidth;
  for (int64_t lane = 0; lane < width && row + lane < c.args.rows; lane += lanes) {
    const int64_t left = c.args.rows - row - lane, valid = left < lanes ? left : lanes;
    for (int64_t n = 0; n < count; n += kWidth) {
      const float* scales = c.args.scales + column + n;
      const F32 scale = n + kWidth <= count ? load(scales) : load_n(scales, count - n, 0.0f);
      F32 block[kWidth];
      if (width == 1) {
        block[0] = to_f32(load_i32(sums + n));
      } else {
        for (int i = 0; i < kWidth; ++i) block[i] = to_f32(load_i32(sums + (n + i) * width + lane));
        transpose(block);
      }
      for (int64_t i = 0; i < valid; ++i)
        store(total + i * kPanelChunk + n, mul(mul(block[i], set1(c.row_scales[row + lane + i])), scale));
    }
    write_out<T, kPanelChunk>(c.args, total, column, row + lane, static_cast<int>(valid));
  }
}

template <class T>
void run_chunks(const Call& c, int64_t first, int64_t last, int32_t* sums) {
  const int64_t tile_columns = c.pack.header.tile + 1;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const int64_t column = chunk * kPanelChunk, left = c.args.out_features - column;
    int64_t width = 0;
    for (int64_t row = 0; row < c.args.rows; row += width) {
      width = panel_width(c.args.rows, row);
      std::memset(sums, 0, static_cast<size_t>((kPanelChunk + 1) * width) * 4);
      const int16_t* panel = c.panels + row * c.pack.panel_columns();
      for (int64_t tile = 0; tile < c.pack.tiles; ++tile, panel += tile_columns * width) {
        const uint8_t* bytes = c.pack.bytes + c.pack.offset(chunk, tile);
        if (width == kVectors * kPairRows)
          stream_codes<kVectors>(bytes, panel, sums);
        else if (width == kPairRows)
          stream_codes<1>(bytes, panel, sums);
        else
          stream_row(bytes, panel, sums);
      }
      drain_panel<T>(c, row, width, column, left < kPanelChunk ? left : kPanelChunk, sums);
    }
  }
}

template <class T>
void run(const Sparse8bitArgs& args) {
  const Call c(args);
  const T* x = static_cast<const T*>(args.x);
  parallel_for(args.rows, kElementsPerPiece / (args.in_features + 1) + 1, args.threads,
               [&](int64_t first, int64_t last, int) {
                 for (int64_t m = first; m < last; ++m)
                   c.row_scales[m] = int8_scale(x + m * args.x_stride, args.in_features);
               });
  parallel_for(c.pack.tiles, kElementsPerPiece / (args.rows * c.pack.header.tile) + 1, args.threads,
               [&](int64_t first, int64_t last, int) { fill_tiles<T>(c, first, last); });
  for_chunk_shares(c.pack, (args.rows + kPairRows - 1) / kPairRows, args.threads,
                   [&](int64_t first, int64_t last, int thread) {
                     run_chunks<T>(c, first, last, c.sums + thread * (kPanelChunk + 1) * kPanelMaxWidth);
                   });
}

}  // namespace
}  // namespace pykd::PYKD_LEVEL

#endif

namespace pykd::PYKD_LEVEL {

// Scratch: scales of rows, panels, then sums of each thread (sparse_8bit_scratch).
void sparse_8bit(const Sparse8bitArgs& args) {
  run_by_dtype(args, [](auto element, const Sparse8bitArgs& a) { run<decltype(element)>(a); });
}

}  // namespace pykd::PYKD_LEVEL
