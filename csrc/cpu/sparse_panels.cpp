// Linear layer over a panels pack (csrc/cpu/sparse_panels.h): y^T = W x^T, one multiply-add of a whole panel a kept
// weight.
//
// x is transposed into panels of P = kVectors * kWidth rows: panel[tile][column][P], each tile followed by a row of
// zeros. A tile of a panel (128 columns x 32 rows = 16 KB at 8 lanes) stays in L1 while the stream of a chunk runs over
// it; two rows of W advance together, so that their sums stay in registers and the chains are long enough to hide the
// latency of the multiply-add. What bounds it is L1: one load a multiply-add plus a broadcast and a quarter index load
// a weight. Sums of a chunk are kept as [chunk row][P] between tiles and transposed into y at the end.
#include "cpu/sparse_panels.h"

#include "cpu/parallel.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {
namespace {

// Waking a thread costs a few microseconds: work below about 30 stays on one.
constexpr int64_t kElementsPerPiece = 1 << 16;  // elements of x to transpose
constexpr int64_t kVectorsPerPiece = 1 << 16;   // kept weights x vectors of rows to multiply

struct Pack {
  SparsePanelsHeader header;
  const uint8_t* bytes;
  int64_t tiles, chunks;

  explicit Pack(const uint8_t* start) : bytes(start) {
    std::memcpy(&header, start, sizeof header);
    tiles = (header.in_features + header.tile - 1) / header.tile;
    chunks = (header.out_features + kPanelChunk - 1) / kPanelChunk;
  }
  int64_t offset(int64_t chunk, int64_t tile) const {
    int64_t at;
    std::memcpy(&at, bytes + sizeof header + 8 * (chunk * tiles + tile), 8);
    return at;
  }
  int64_t panel_columns() const { return tiles * (header.tile + 1); }
};

// --- one stream over one tile of one panel
// ------------------------------------------------------------------------------

PYKD_INLINE void read_pair(const uint8_t*& at, uint32_t& first, uint32_t& second) {
  uint16_t both[2];
  std::memcpy(both, at, 4);
  first = both[0];
  second = both[1];
  at += 4;
}

template <int kVectors>
PYKD_INLINE void stream_panel(const uint8_t* at, const float* panel, float* sums) {
  constexpr int kPanel = kVectors * kWidth;
  constexpr int kChains = kVectors <= 2 ? 2 : 1;  // sums of a row: narrow panels need more of them
  for (;;) {
    uint32_t groups, pairs;
    read_pair(at, groups, pairs);
    if (groups == 0) return;
    for (uint32_t pair = 0; pair < pairs; ++pair) {
      uint32_t row[2];
      read_pair(at, row[0], row[1]);
      F32 sum[2][kChains][kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        for (int side = 0; side < 2; ++side) {
          sum[side][0][v] = load(sums + row[side] * kPanel + v * kWidth);
          for (int chain = 1; chain < kChains; ++chain) sum[side][chain][v] = set1(0.0f);
        }
      for (uint32_t group = 0; group < groups; ++group, at += kPanelGroupBytes) {
#pragma GCC unroll 4
        for (int slot = 0; slot < 4; ++slot) {
          float value;
          std::memcpy(&value, at + 4 + 4 * slot, 4);
          const float* x = panel + static_cast<size_t>(at[slot]) * kPanel;
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
    read_pair(at, groups, pairs);
    if (groups == 0) return;
    for (uint32_t pair = 0; pair < pairs; ++pair) {
      uint32_t a, b;
      read_pair(at, a, b);
      float sum[4] = {sums[a], sums[b], 0.0f, 0.0f};
      for (uint32_t group = 0; group < groups; ++group, at += kPanelGroupBytes) {
        float value[4];
        std::memcpy(value, at + 4, 16);
#pragma GCC unroll 4
        for (int slot = 0; slot < 4; ++slot) sum[slot] += value[slot] * x[at[slot]];
      }
      sums[a] = sum[0] + sum[2];
      sums[b] = sum[1] + sum[3];
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

// Vectors in the panel that begins at `row`: as wide as the rows that are left fill, one scalar lane for a single row.
int64_t panel_width(int64_t rows, int64_t row) {
  const int64_t left = rows - row;
  if (rows == 1) return 1;
  if (left > 2 * kWidth) return 4 * kWidth;
  return left > kWidth ? 2 * kWidth : kWidth;
}

void stream(const uint8_t* bytes, int64_t width, const float* panel, float* sums) {
  if (width == 4 * kWidth)
    stream_panel<4>(bytes, panel, sums);
  else if (width == 2 * kWidth)
    stream_panel<2>(bytes, panel, sums);
  else if (width == kWidth && kWidth > 1)
    stream_panel<1>(bytes, panel, sums);
  else
    stream_row(bytes, panel, sums);
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
      width = panel_width(args.rows, row);
      std::memset(sums, 0, static_cast<size_t>((kPanelChunk + 1) * width) * sizeof(float));
      const float* panel = panels + row * pack.panel_columns();
      for (int64_t tile = 0; tile < pack.tiles; ++tile)
        stream(pack.bytes + pack.offset(chunk, tile), width, panel + tile * tile_columns * width, sums);
      drain_panel(args, row, width, column, count, sums);
    }
  }
}

void fill_tiles(const SparsePanelsArgs& args, const Pack& pack, int64_t first, int64_t last) {
  const int64_t step = pack.header.tile;
  int64_t width = 0;
  for (int64_t row = 0; row < args.rows; row += width) {
    width = panel_width(args.rows, row);
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

  // A thread takes the chunks whose streams begin in its share of the bytes, so that threads have equal work whatever
  // the rows hold, and any number of threads can run a pack.
  const int64_t vectors = (args.rows + kWidth - 1) / kWidth;
  int64_t shares = pack.header.nnz * vectors / kVectorsPerPiece + 1;
  if (shares > args.threads) shares = args.threads;
  if (shares > pack.chunks) shares = pack.chunks;
  const int64_t begin = pack.offset(0, 0);
  const int64_t total = pack.offset(pack.chunks, 0) - begin;
  float* sums = args.scratch + (args.rows + kPanelMaxWidth) * pack.panel_columns();
  parallel_for(shares, 1, args.threads, [&](int64_t first, int64_t last, int thread) {
    int64_t chunk = 0;
    while (chunk < pack.chunks && pack.offset(chunk, 0) - begin < total * first / shares) ++chunk;
    int64_t end = chunk;
    while (end < pack.chunks && (last == shares || pack.offset(end, 0) - begin < total * last / shares)) ++end;
    run_chunks(args, pack, chunk, end, args.scratch, sums + thread * (kPanelChunk + 1) * kPanelMaxWidth);
  });
}

}  // namespace pykd::PYKD_LEVEL
