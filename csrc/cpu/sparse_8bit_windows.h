// Sparse w8a8 with byte permutations: linear layer over the windows pack of a pruned int8 weight
// (csrc/cpu/sparse_panels.h). Included by sparse_8bit.cpp only, at the avx512 level.
//
// A step takes up to four kept weights of each of 16 outputs, whose columns lie within 64 of another. For each row of
// x one vpermb fetches the codes of these columns from the 64 of that row, and one vpdpbusd multiplies and adds them:
// two instructions for 64 products, where pairs of int16 need six loads, shuffles and multiply-adds, and the dense
// kernel has one instruction for 64 weights, kept or not. vpdpbusd multiplies unsigned by signed bytes, so that
// activations are stored plus 128, and sums start at minus 128 times the sum of their output's weights.
//
//   panel  [window][row][64], windows every 32 columns, so that each overlaps the next: up to 12 rows of x
//   block  32 windows; of a panel 24 KB, which stay in the first-level cache while the strips of a group use them
//   group  8 strips of 16 outputs; what they have in a block is read from the second-level cache by each panel
//
// A step and a row take 0.9 cycles of a Zen 5, where the dense kernel takes 0.7 for its instruction. With 20 % of
// random weights kept, 47 steps serve what takes that 192 instructions; of the entries of a step 0.81 are used (0.66 at
// 10 %).
#pragma once

#include "cpu/int8_rows.h"
#include "cpu/linear_rows.h"
#include "cpu/sparse_panels.h"
#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {
namespace {

constexpr int kWindowRows = 12;                 // sums of a register tile
constexpr int kPrefetchBytes = 4096;            // the stream of a strip, ahead of its use; 1024 is too late for 8 rows
constexpr int64_t kRowStepsPerPiece = 1 << 16;  // steps x rows below which waking a thread costs more than it saves
constexpr int64_t kRowsOfMemory = 8;            // rows whose arithmetic takes as long as the loading of a step
constexpr int64_t kElementsPerPiece = 1 << 13;  // elements of x to round
static_assert(kWidth == kWindowOutputs, "a strip is a vector of sums");

struct WindowStrip {
  const uint8_t *starts, *begins, *windows, *lines;

  WindowStrip(const uint8_t* pack, int64_t index, int64_t blocks) {
    int64_t offset;
    std::memcpy(&offset, pack + sizeof(SparsePanelsHeader) + 8 * index, 8);
    starts = pack + offset;
    begins = starts + 4 * kWindowOutputs;
    windows = begins + 4 * (blocks + 1);
    lines = pack + offset + windows_header_bytes(blocks, begin(blocks));
  }
  int64_t begin(int64_t block) const {
    uint32_t step;
    std::memcpy(&step, begins + 4 * block, 4);
    return step;
  }
};

// sums[MR][kWidth] += `steps` steps; panel: where the MR rows begin, window 0.
template <int MR>
void window_tile(const uint8_t* windows, const uint8_t* line, int64_t steps, const uint8_t* panel, int32_t* sums) {
  __m512i sum[MR];
  for (int m = 0; m < MR; ++m) sum[m] = load_i32(sums + m * kWidth).v;
  for (int64_t step = 0; step < steps; ++step, line += kWindowStepBytes) {
    uint16_t window;
    std::memcpy(&window, windows + 2 * step, 2);
    const uint8_t* x = panel + static_cast<size_t>(window) * (MR * kWindowColumns);
    const __m512i columns = _mm512_loadu_si512(line), weights = _mm512_loadu_si512(line + 64);
    __builtin_prefetch(line + kPrefetchBytes);
    __builtin_prefetch(line + kPrefetchBytes + 64);
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
      const __m512i codes = _mm512_permutexvar_epi8(columns, _mm512_loadu_si512(x + m * kWindowColumns));
      sum[m] = _mm512_dpbusd_epi32(sum[m], codes, weights);
    }
  }
  for (int m = 0; m < MR; ++m) store_i32(sums + m * kWidth, {sum[m]});
}

template <int MR = kWindowRows>
void window_panel(int rows, const uint8_t* windows, const uint8_t* line, int64_t steps, const uint8_t* panel,
                  int32_t* sums) {
  if constexpr (MR > 1) {
    if (rows < MR) return window_panel<MR - 1>(rows, windows, line, steps, panel, sums);
  }
  window_tile<MR>(windows, line, steps, panel, sums);
}

struct WindowCall {
  const Sparse8bitArgs& args;
  int64_t windows, blocks, strips;
  float* row_scales;  // [rows]
  uint8_t* panels;    // [rows of a pass][windows][64]
  int32_t* sums;      // [threads][rows of a pass][kWindowsGroup][kWidth]

  explicit WindowCall(const Sparse8bitArgs& a)
      : args(a),
        windows((a.in_features + kWindowStride - 1) / kWindowStride),
        blocks((windows + kBlockWindows - 1) / kBlockWindows),
        strips((a.out_features + kWidth - 1) / kWidth),
        row_scales(a.scratch),
        panels(reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(a.scratch + a.rows) + 63) & ~uintptr_t{63})),
        sums(reinterpret_cast<int32_t*>(panels + pass_rows() * windows * kWindowColumns)) {}
  int64_t pass_rows() const { return args.rows < kWindowsPassRows ? args.rows : kWindowsPassRows; }
  int64_t offset(int64_t strip) const {
    int64_t at;
    std::memcpy(&at, args.pack + sizeof(SparsePanelsHeader) + 8 * strip, 8);
    return at;
  }
};

// Codes of row `row` of x, plus 128, into the windows of row m of a panel of `rows` rows.
template <class T>
void fill_windows(const WindowCall& c, int64_t row, int64_t m, int64_t rows, uint8_t* panel) {
  const T* x = static_cast<const T*>(c.args.x) + row * c.args.x_stride;
  const float scale = c.row_scales[row] = int8_scale(x, c.args.in_features);
  const __m128i flip = _mm_set1_epi8(static_cast<char>(128));
  for (int64_t k = 0; k < (c.windows + 1) * kWindowStride; k += kChunk) {
    alignas(16) uint8_t bytes[kChunk];
    round_chunk(x, k, c.args.in_features, scale, bytes);
    const __m128i codes = _mm_xor_si128(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)), flip);
    const int64_t window = k / kWindowStride, at = k % kWindowStride;
    const auto put = [&](int64_t into, int64_t place) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(panel + (into * rows + m) * kWindowColumns + place), codes);
    };
    if (window < c.windows) put(window, at);
    if (window > 0) put(window - 1, kWindowStride + at);
  }
}

// sums[strip][rows][kWidth] of `Strips` strips * row scale * scale + bias -> y: rows of y in pieces as long as can be.
template <class T, int Strips>
void drain_windows(const WindowCall& c, int64_t row, int rows, int64_t strip, const int32_t* sums) {
  constexpr int kOutputs = Strips * kWidth;
  alignas(64) float total[kWindowRows * kOutputs];
  for (int i = 0; i < Strips; ++i) {
    const int64_t left = c.args.out_features - (strip + i) * kWidth;
    const float* scales = c.args.scales + (strip + i) * kWidth;
    const F32 scale = left >= kWidth ? load(scales) : load_n(scales, left, 0.0f);
    for (int m = 0; m < rows; ++m) {
      const F32 sum = to_f32(load_i32(sums + (i * rows + m) * kWidth));
      store(total + m * kOutputs + i * kWidth, mul(mul(sum, set1(c.row_scales[row + m])), scale));
    }
  }
  write_out<T, kOutputs>(c.args, total, strip * kWidth, row, rows);
}

// Strips [first, last), at most a group, for the rows of a pass that begins at `row0`. sums: of panel p and strip s at
// [panels.row(p)][s], a tile each.
template <class T>
void run_group(const WindowCall& c, const Panels& panels, int64_t row0, int64_t first, int64_t last, int32_t* sums) {
  const int64_t count = last - first;
  const auto tile = [&](int64_t p, int64_t strip) {
    return sums + (panels.row(p) * count + (strip - first) * panels.size(p)) * kWidth;
  };
  const auto multiply = [&](int64_t p, int64_t strip, int64_t block, int64_t end_block) {
    const WindowStrip s(c.args.pack, strip, c.blocks);
    const int64_t begin = s.begin(block), end = s.begin(end_block);
    if (block == 0)
      for (int m = 0; m < panels.size(p); ++m)
        store_i32(tile(p, strip) + m * kWidth, load_i32(reinterpret_cast<const int32_t*>(s.starts)));
    window_panel(panels.size(p), s.windows + 2 * begin, s.lines + kWindowStepBytes * begin, end - begin,
                 c.panels + panels.row(p) * c.windows * kWindowColumns, tile(p, strip));
  };
  if (panels.count <= 2) {  // memory is the limit: read the strips as they lie there
    for (int64_t strip = first; strip < last; ++strip)
      for (int64_t p = 0; p < panels.count; ++p) multiply(p, strip, 0, c.blocks);
  } else {
    for (int64_t block = 0; block < c.blocks; ++block)
      for (int64_t p = 0; p < panels.count; ++p)
        for (int64_t strip = first; strip < last; ++strip) multiply(p, strip, block, block + 1);
  }
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t row = row0 + panels.row(p);
    if (count == kWindowsGroup)
      drain_windows<T, kWindowsGroup>(c, row, panels.size(p), first, tile(p, first));
    else
      for (int64_t strip = first; strip < last; ++strip)
        drain_windows<T, 1>(c, row, panels.size(p), strip, tile(p, strip));
  }
}

// A thread takes the strips that begin in its share of the bytes, so that threads have equal work whatever is kept.
template <class T>
void run_pass(const WindowCall& c, int64_t row0, int64_t rows) {
  const Panels panels(rows, kWindowRows);
  parallel_for(rows, kElementsPerPiece / (c.args.in_features + 1) + 1, c.args.threads,
               [&](int64_t begin, int64_t end, int) {
                 for (int64_t p = 0; p < panels.count; ++p)
                   for (int64_t row = panels.row(p); row < panels.row(p + 1); ++row)
                     if (row >= begin && row < end)
                       fill_windows<T>(c, row0 + row, row - panels.row(p), panels.size(p),
                                       c.panels + panels.row(p) * c.windows * kWindowColumns);
               });
  const int64_t start = c.offset(0), bytes = c.offset(c.strips) - start;
  int64_t shares = bytes / kWindowStepBytes * (rows + kRowsOfMemory) / kRowStepsPerPiece + 1;
  if (shares > c.args.threads) shares = c.args.threads;
  parallel_for(shares, 1, c.args.threads, [&](int64_t first, int64_t last, int thread) {
    int32_t* sums = c.sums + thread * c.pass_rows() * kWindowsGroup * kWidth;
    int64_t strip = 0;
    while (strip < c.strips && c.offset(strip) - start < bytes * first / shares) ++strip;
    int64_t end = strip;
    while (end < c.strips && (last == shares || c.offset(end) - start < bytes * last / shares)) ++end;
    for (; strip < end; strip += kWindowsGroup)
      run_group<T>(c, panels, row0, strip, strip + kWindowsGroup < end ? strip + kWindowsGroup : end, sums);
  });
}

template <class T>
void run(const Sparse8bitArgs& args) {
  const WindowCall c(args);
  for (int64_t row = 0; row < args.rows; row += kWindowsPassRows)
    run_pass<T>(c, row, args.rows - row < kWindowsPassRows ? args.rows - row : kWindowsPassRows);
}

}  // namespace
}  // namespace pykd::PYKD_LEVEL
