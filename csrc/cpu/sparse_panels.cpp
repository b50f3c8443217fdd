// Linear layer over a panels pack (csrc/cpu/sparse_panels.h): y^T = W x^T, one multiply-add of a whole panel a kept
// weight.
//
// x is transposed into panels of P = kVectors * kWidth rows: panel[tile][column][P], each tile followed by a row of
// zeros. A tile of a panel (128 columns x 32 rows = 16 KB at 8 lanes) stays in L1 while the stream of a chunk runs over
// it; two rows of W advance together (four that keep the same columns), so that their sums stay in registers and the
// chains are long enough to hide the latency of the multiply-add. What bounds it is L1: one load a multiply-add plus a
// broadcast and a quarter index load a weight (the four column bytes of a group as one word: loaded one by one, they
// cost a tenth of the time); rows that share their columns load a vector of x once for all four. Sums of a chunk are
// kept as [chunk row][P] between tiles and transposed into y at the end.
#include "cpu/sparse_panels.h"

#include "cpu/parallel.h"
#include "cpu/sparse_stream.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {
namespace {

// How far ahead of the arithmetic the stream of a weight is asked for. Hardware alone stops at every page, which costs
// a third of the time at 16 rows.
constexpr int kPrefetchBytes = 1024;

PYKD_INLINE uint32_t load_columns(const uint8_t* at) {
  uint32_t columns;
  std::memcpy(&columns, at, 4);
  return columns;
}
PYKD_INLINE size_t column_of(uint32_t columns, int slot) { return columns >> 8 * slot & 255; }

// --- one stream over one tile of one panel
// ------------------------------------------------------------------------------

template <int kVectors>
PYKD_INLINE void stream_panel(const uint8_t* at, const float* panel, float* sums) {
  constexpr int kPanel = kVectors * kWidth;
  constexpr int kChains = kVectors <= 2 ? 2 : 1;  // sums of a row: narrow panels need more of them
  for (;;) {
    uint32_t groups, pairs;
    read_two(at, groups, pairs);
    if (groups == 0) return;
    for (uint32_t pair = 0; pair < pairs; ++pair) {
      uint32_t row[2];
      read_two(at, row[0], row[1]);
      F32 sum[2][kChains][kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        for (int side = 0; side < 2; ++side) {
          sum[side][0][v] = load(sums + row[side] * kPanel + v * kWidth);
          for (int chain = 1; chain < kChains; ++chain) sum[side][chain][v] = set1(0.0f);
        }
      for (uint32_t group = 0; group < groups; ++group, at += group_bytes(kPairs)) {
        __builtin_prefetch(at + kPrefetchBytes);
        const uint32_t columns = load_columns(at);
#pragma GCC unroll 4
        for (int slot = 0; slot < 4; ++slot) {
          float value;
          std::memcpy(&value, at + 4 + 4 * slot, 4);
          const float* x = panel + column_of(columns, slot) * kPanel;
          const F32 weight = set1(value);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            F32& to = sum[slot % 2][slot / 2 % kChains][v];
            to = fma(weight, load(x + v * kWidth), to);
          }
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        for (int side = 0; side < 2; ++side) {
          F32 total = sum[side][0][v];
          for (int chain = 1; chain < kChains; ++chain) total = add(total, sum[side][chain][v]);
          store(sums + row[side] * kPanel + v * kWidth, total);
        }
    }
  }
}

// The same for a single row of x: the four entries of a group in scalar registers.
void stream_row(const uint8_t* at, const float* x, float* sums) {
  for (;;) {
    uint32_t groups, pairs;
    read_two(at, groups, pairs);
    if (groups == 0) return;
    for (uint32_t pair = 0; pair < pairs; ++pair) {
      uint32_t a, b;
      read_two(at, a, b);
      float sum[4] = {sums[a], sums[b], 0.0f, 0.0f};
      for (uint32_t group = 0; group < groups; ++group, at += group_bytes(kPairs)) {
        __builtin_prefetch(at + kPrefetchBytes);
        const uint32_t columns = load_columns(at);
        float value[4];
        std::memcpy(value, at + 4, 16);
#pragma GCC unroll 4
        for (int slot = 0; slot < 4; ++slot) sum[slot] += value[slot] * x[column_of(columns, slot)];
      }
      sums[a] = sum[0] + sum[2];
      sums[b] = sum[1] + sum[3];
    }
  }
}

// Four rows of W with the same columns: a vector of x is loaded once for all of them.
template <int kVectors>
PYKD_INLINE void stream_quads(const uint8_t* at, const float* panel, float* sums) {
  constexpr int kPanel = kVectors * kWidth;
  for (;;) {
    uint32_t groups, quads;
    read_two(at, groups, quads);
    if (groups == 0) return;
    for (uint32_t quad = 0; quad < quads; ++quad) {
      uint32_t row, unused;
      read_two(at, row, unused);
      float* target = sums + row * kPanel;
      F32 sum[4][kVectors];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
        for (int v = 0; v < kVectors; ++v) sum[r][v] = load(target + r * kPanel + v * kWidth);
      for (uint32_t group = 0; group < groups; ++group, at += group_bytes(kQuads)) {
        __builtin_prefetch(at + kPrefetchBytes);
        const uint32_t columns = load_columns(at);
#pragma GCC unroll 4
        for (int entry = 0; entry < 4; ++entry) {
          float value[4];
          std::memcpy(value, at + 4 + 16 * entry, 16);
          const float* x = panel + column_of(columns, entry) * kPanel;
          F32 activations[kVectors];
          for (int v = 0; v < kVectors; ++v) activations[v] = load(x + v * kWidth);
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) {
            const F32 weight = set1(value[r]);
            for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(weight, activations[v], sum[r][v]);
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
        for (int v = 0; v < kVectors; ++v) store(target + r * kPanel + v * kWidth, sum[r][v]);
    }
  }
}

// The same for a single row of x.
void stream_quad_row(const uint8_t* at, const float* x, float* sums) {
  for (;;) {
    uint32_t groups, quads;
    read_two(at, groups, quads);
    if (groups == 0) return;
    for (uint32_t quad = 0; quad < quads; ++quad) {
      uint32_t row, unused;
      read_two(at, row, unused);
      float sum[2][4] = {};
      for (uint32_t group = 0; group < groups; ++group, at += group_bytes(kQuads)) {
        __builtin_prefetch(at + kPrefetchBytes);
        const uint32_t columns = load_columns(at);
        float value[4][4];
        std::memcpy(value, at + 4, sizeof value);
#pragma GCC unroll 4
        for (int entry = 0; entry < 4; ++entry)
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) sum[entry % 2][r] += value[entry][r] * x[column_of(columns, entry)];
      }
      for (int r = 0; r < 4; ++r) sums[row + static_cast<uint32_t>(r)] += sum[0][r] + sum[1][r];
    }
  }
}

// --- panels of x in, rows of y out
// ----------------------------------------------------------------------------------------

// Columns [column0, column1) of rows [row, row + width) of x -> panel[column][width]; rows past the end become 0.
void fill_panel(const SparsePanelsArgs& args, int64_t row, int64_t width, int64_t column0, int64_t column1,
                float* panel) {
  const int64_t lanes = width < kWidth ? width : kWidth;
  for (int64_t lane = 0; lane < width; lane += lanes) {
    const int64_t valid = args.rows - row - lane < lanes ? args.rows - row - lane : lanes;
    int64_t column = column0;
    if (valid == kWidth) {
      for (; column + kWidth <= column1; column += kWidth) {
        F32 block[kWidth];
        for (int i = 0; i < kWidth; ++i) block[i] = load(args.x + (row + lane + i) * args.x_stride + column);
        transpose(block);
        for (int i = 0; i < kWidth; ++i) store(panel + (column - column0 + i) * width + lane, block[i]);
      }
    }
    for (; column < column1; ++column)
      for (int64_t i = 0; i < lanes; ++i)
        panel[(column - column0) * width + lane + i] =
            i < valid ? args.x[(row + lane + i) * args.x_stride + column] : 0.0f;
  }
}

// sums[chunk row][width] + bias -> y[row + lane][column + chunk row]
void drain_panel(const SparsePanelsArgs& args, int64_t row, int64_t width, int64_t column, int64_t count,
                 const float* sums) {
  const int64_t lanes = width < kWidth ? width : kWidth;
  for (int64_t lane = 0; lane < width && row + lane < args.rows; lane += lanes) {
    const int64_t valid = args.rows - row - lane < lanes ? args.rows - row - lane : lanes;
    float* y = args.y + (row + lane) * args.out_features + column;
    int64_t n = 0;
    for (; lanes == kWidth && n + kWidth <= count; n += kWidth) {
      F32 block[kWidth];
      for (int i = 0; i < kWidth; ++i) block[i] = load(sums + (n + i) * width + lane);
      transpose(block);
      const F32 bias = args.bias ? load(args.bias + column + n) : set1(0.0f);
      for (int64_t i = 0; i < valid; ++i) store(y + i * args.out_features + n, add(block[i], bias));
    }
    for (; n < count; ++n)
      for (int64_t i = 0; i < valid; ++i)
        y[i * args.out_features + n] = sums[n * width + lane + i] + (args.bias ? args.bias[column + n] : 0.0f);
  }
}

#if defined(PYKD_LEVEL_avx2)
constexpr int kQuadVectors = 2;  // 4 x 2 sums, 2 vectors of x and a weight in 16 registers
#else
constexpr int kQuadVectors = 4;
#endif

// Vectors in the panel that begins at `row`: as wide as the rows that are left fill, one scalar lane for a single row.
int64_t panel_width(const Pack& pack, int64_t rows, int64_t row) {
  const int64_t left = rows - row;
  if (rows == 1) return 1;
  const int64_t most = pack.header.packing == kQuads ? kQuadVectors : 4;
  if (left > 2 * kWidth) return most * kWidth;
  return left > kWidth ? 2 * kWidth : kWidth;
}

void stream_pairs(const uint8_t* bytes, int64_t width, const float* panel, float* sums) {
  if (width == 4 * kWidth)
    stream_panel<4>(bytes, panel, sums);
  else if (width == 2 * kWidth)
    stream_panel<2>(bytes, panel, sums);
  else if (width == kWidth && kWidth > 1)
    stream_panel<1>(bytes, panel, sums);
  else
    stream_row(bytes, panel, sums);
}

void stream(const Pack& pack, int64_t chunk, int64_t tile, int64_t width, const float* panel, float* sums) {
  const uint8_t* bytes = pack.bytes + pack.offset(chunk, tile);
  if (pack.header.packing == kPairs)
    stream_pairs(bytes, width, panel, sums);
  else if (width == kQuadVectors * kWidth)
    stream_quads<kQuadVectors>(bytes, panel, sums);
  else if (width == 2 * kWidth)
    stream_quads<2>(bytes, panel, sums);
  else if (width == kWidth && kWidth > 1)
    stream_quads<1>(bytes, panel, sums);
  else
    stream_quad_row(bytes, panel, sums);
}

void run_chunks(const SparsePanelsArgs& args, const Pack& pack, int64_t first, int64_t last, const float* panels,
                float* sums) {
  const int64_t tile_columns = pack.header.tile + 1;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const int64_t column = chunk * kPanelChunk;
    const int64_t left = args.out_features - column;
    const int64_t count = left < kPanelChunk ? left : kPanelChunk;
    int64_t width = 0;
    for (int64_t row = 0; row < args.rows; row += width) {
      width = panel_width(pack, args.rows, row);
      std::memset(sums, 0, static_cast<size_t>((kPanelChunk + 1) * width) * sizeof(float));
      const float* panel = panels + row * pack.panel_columns();
      for (int64_t tile = 0; tile < pack.tiles; ++tile)
        stream(pack, chunk, tile, width, panel + tile * tile_columns * width, sums);
      drain_panel(args, row, width, column, count, sums);
    }
  }
}

void fill_tiles(const SparsePanelsArgs& args, const Pack& pack, int64_t first, int64_t last) {
  const int64_t step = pack.header.tile;
  int64_t width = 0;
  for (int64_t row = 0; row < args.rows; row += width) {
    width = panel_width(pack, args.rows, row);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t end = (tile + 1) * step < args.in_features ? (tile + 1) * step : args.in_features;
      float* panel = args.scratch + row * pack.panel_columns() + tile * (step + 1) * width;
      fill_panel(args, row, width, tile * step, end, panel);
      std::memset(panel + step * width, 0, static_cast<size_t>(width) * sizeof(float));  // where fillers point
    }
  }
}

}  // namespace

// Scratch: the panels, then kPanelChunk + 1 rows of sums a thread (sparse_panels_scratch).
void sparse_panels(const SparsePanelsArgs& args) {
  const Pack pack(args.pack);
  parallel_for(pack.tiles, kElementsPerPiece / (args.rows * pack.header.tile) + 1, args.threads,
               [&](int64_t first, int64_t last, int) { fill_tiles(args, pack, first, last); });

  float* sums = args.scratch + (args.rows + kPanelMaxWidth) * pack.panel_columns();
  for_chunk_shares(pack, (args.rows + kWidth - 1) / kWidth, args.threads, [&](int64_t first, int64_t last, int thread) {
    run_chunks(args, pack, first, last, args.scratch, sums + thread * (kPanelChunk + 1) * kPanelMaxWidth);
  });
}

}  // namespace pykd::PYKD_LEVEL
