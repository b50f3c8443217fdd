// y = x W^T + bias for int4 and uint4 weights in the layout `int4_r16` (linear_4bit_layout.h), with activations rounded
// to int8 under a scale per row and group (w4a8): products are summed as integers, and folded into float32 totals with
// both scales once per group (avx2: every kFoldAt k of it).
//
// Zero points: sum (q - zero) a = sum (q - 8) a - (zero - 8) sum a, one multiply-add per fold.
#include "cpu/linear_4bit_codes.h"
#include "cpu/linear_4bit_layout.h"
#include "cpu/linear_rows.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {
namespace {

// Weights of a strip that all panels use before those after them: they stay in the first-level cache, or (avx512, whose
// steps read few bytes for their work) in the second.
#if defined(PYKD_LEVEL_avx512)
constexpr int64_t kPieceBytes = 262144;
#else
constexpr int64_t kPieceBytes = 16384;
#endif

int64_t folds_of(int64_t size) { return (size + kFoldAt - 1) / kFoldAt; }

// Rounded activations in `scratch`. Codes: panels of [padded_k / 4][rows][4] int8. Notes: of every panel and fold, the
// starts of the sums [rows] int32, the scales [rows] and the sums of the codes [rows] float32.
struct Activations {
  int64_t padded_k, folds;
  uint8_t* codes;
  float* notes;

  Activations(const Linear4bitArgs& a, const Int4R16& s, int64_t rows)
      : padded_k(s.padded_k),
        folds((s.groups - 1) * folds_of(s.padded_group) + folds_of(s.padded_last)),
        codes(reinterpret_cast<uint8_t*>(a.scratch)),
        notes(a.scratch + rows * s.padded_k / 4) {}
};

// --- activations ----------------------------------------------------------------------------------------------------

// Row m of a panel of `rows`.
template <class T>
void round_groups(const T* x, int rows, int m, const Linear4bitArgs& a, const Int4R16& s, uint8_t* codes,
                  float* notes) {
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t size = s.size(g), left = a.in_features - g * s.group, count = left < s.group ? left : s.group;
    const float scale = int8_scale(x, count);
    CodeSums sums;
    for (int64_t k = 0; k < size; k += kChunk) {
      uint8_t bytes[kChunk];
      round_chunk(x, k, count, scale, bytes);
      const int64_t chunk = size - k < kChunk ? size - k : kChunk;
      for (int64_t j = 0; j < chunk; j += 4) std::memcpy(codes + ((k + j) / 4 * rows + m) * 4, bytes + j, 4);
      sums.add(bytes);
      if (k + kChunk < size && (k + kChunk) % kFoldAt != 0) continue;
      const int32_t start = sums.start();
      std::memcpy(notes + m, &start, 4);
      notes[rows + m] = scale;
      notes[2 * rows + m] = static_cast<float>(sums.total());
      notes += 3 * rows;
      sums = CodeSums();
    }
    codes += size * rows;
    x += count;
  }
}

template <class T>
void round_panels(const Linear4bitArgs& a, const Int4R16& s, const Panels& panels, const Activations& to,
                  int64_t first) {
  parallel_for(panels.count, grain(kCodeRows * s.padded_k), a.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = panels.row(p);
      for (int m = 0; m < panels.size(p); ++m)
        round_groups(static_cast<const T*>(a.x) + (first + row + m) * a.x_stride, panels.size(p), m, a, s,
                     to.codes + row * to.padded_k, to.notes + row * 3 * to.folds);
    }
  });
}

// --- register tile --------------------------------------------------------------------------------------------------

struct Piece {  // groups [begin, end) of a strip, for a panel of activations
  const Int4R16& s;
  const uint8_t* strip;
  int64_t begin, end;
  const uint8_t* codes;
  const float* notes;
};

template <int NV, int MR>
PYKD_INLINE void multiply(const Nibbles (&w)[NV], const uint8_t* codes, Sum (&sum)[NV][MR]) {
  for (int m = 0; m < MR; ++m) {
    const Quad quad = load_quad(codes + 4 * m);
    for (int i = 0; i < NV; ++i) sum[i][m] = dot(sum[i][m], w[i], quad);
  }
}

// sum += the products of 8 k; moves on to the next ones.
template <int NV, int MR>
PYKD_INLINE void multiply_eight(const uint8_t*& line, const uint8_t*& codes, Prefetch& prefetch, Sum (&sum)[NV][MR]) {
  Words words[NV];
  Nibbles w[NV];
  for (int i = 0; i < NV; ++i) words[i] = load_words(line + i * kWidth * 4);
  for (int i = 0; i < NV; ++i) w[i] = low(words[i]);
  prefetch.step<NV>();
  multiply(w, codes, sum);
  for (int i = 0; i < NV; ++i) w[i] = high(in_order(words[i]));
  multiply(w, codes + 4 * MR, sum);
  line += 4 * kStrip;
  codes += 8 * MR;
}

// total[m][row ...] += NV * kWidth outputs of a piece for the MR rows of its panel.
template <int NV, int MR, bool kZeros>
void tile(const Piece& piece, int row, Prefetch& stream, float* total) {
  Prefetch prefetch = stream;
  const uint8_t* codes = piece.codes;
  const float* notes = piece.notes;
  const uint8_t* block = piece.strip + piece.s.block(piece.begin);
  F32 sums[NV][MR];
  for (int i = 0; i < NV; ++i)
    for (int m = 0; m < MR; ++m) sums[i][m] = load(total + m * kStrip + row + i * kWidth);
  for (int64_t g = piece.begin; g < piece.end; ++g) {
    const int64_t size = piece.s.size(g);
    const uint8_t* line = block + piece.s.scale_bytes + row * 4;
    for (int64_t k = 0; k < size; k += kFoldAt, notes += 3 * MR) {
      Sum sum[NV][MR];
      for (int m = 0; m < MR; ++m) {
        const Sum start = start_sum(load_four_bytes(reinterpret_cast<const uint8_t*>(notes + m)));
        for (int i = 0; i < NV; ++i) sum[i][m] = start;
      }
      int64_t eights = (size - k < kFoldAt ? size - k : kFoldAt) / 8;
      for (; eights >= kEights; eights -= kEights) {
#pragma GCC unroll 4
        for (int e = 0; e < kEights; ++e) multiply_eight(line, codes, prefetch, sum);
      }
      for (; eights > 0; --eights) multiply_eight(line, codes, prefetch, sum);
      for (int i = 0; i < NV; ++i) {
        const F32 scale = piece.s.scales(block, row + i * kWidth);
        F32 zero = set1(0.0f);
        if constexpr (kZeros) zero = sub(load_bytes(piece.strip + g * kStrip + row + i * kWidth), set1(8.0f));
        for (int m = 0; m < MR; ++m) {
          F32 value = to_f32(sum[i][m]);
          if constexpr (kZeros) value = fnma(zero, set1(notes[2 * MR + m]), value);
          sums[i][m] = fma(mul(value, set1(notes[MR + m])), scale, sums[i][m]);
        }
      }
    }
    block += piece.s.scale_bytes + size * (kStrip / 2);
  }
  stream = prefetch;
  for (int i = 0; i < NV; ++i)
    for (int m = 0; m < MR; ++m) store(total + m * kStrip + row + i * kWidth, sums[i][m]);
}

template <bool kZeros, int MR = kCodeRows>
void panel(int rows, const Piece& piece, Prefetch& prefetch, float* total) {
  if constexpr (MR > 1) {
    if (rows < MR) return panel<kZeros, MR - 1>(rows, piece, prefetch, total);
  }
  constexpr int NV = code_vectors(MR);
  for (int row = 0; row < kStrip; row += NV * kWidth) tile<NV, MR, kZeros>(piece, row, prefetch, total);
}

// --- the call -------------------------------------------------------------------------------------------------------

template <class T, bool kZeros>
void rounded_rows(const Linear4bitArgs& a, const Int4R16& s, int64_t first, int64_t rows) {
  const Panels panels(rows, kCodeRows);
  const Activations x(a, s, rows);
  round_panels<T>(a, s, panels, x, first);
  const int64_t group_bytes = s.scale_bytes + s.padded_group * (kStrip / 2);
  const int64_t step = group_bytes < kPieceBytes ? kPieceBytes / group_bytes : 1;
  for_strips(s.strips, s.padded_k, a.threads, panels, [&](int64_t item, int64_t begin, int64_t end) {
    alignas(64) float total[kLinear4bitRows * kStrip];
    for (int64_t i = panels.row(begin) * kStrip; i < panels.row(end) * kStrip; ++i) total[i] = 0.0f;
    const uint8_t* strip = a.packed + item * s.strip_bytes;
    const int64_t tiles = (end - begin) * kStrip / (code_vectors(panels.size(begin)) * kWidth);
    for (int64_t g = 0; g < s.groups; g += step) {
      const int64_t stop = g + step < s.groups ? g + step : s.groups;
      Prefetch prefetch = s.prefetch(strip, g, stop, tiles);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t row = panels.row(p);
        const int size = panels.size(p);
        const Piece piece = {s,
                             strip,
                             g,
                             stop,
                             x.codes + row * s.padded_k + g * s.padded_group * size,
                             x.notes + row * 3 * x.folds + g * folds_of(s.padded_group) * 3 * size};
        panel<kZeros>(size, piece, prefetch, total + row * kStrip);
      }
    }
    write_out<T, kStrip>(a, total + panels.row(begin) * kStrip, item * kStrip, first + panels.row(begin),
                         static_cast<int>(panels.row(end) - panels.row(begin)));
  });
}

template <class T>
void run(const Linear4bitArgs& a) {
  const Int4R16 s(a);
  for (int64_t first = 0; first < a.rows; first += kLinear4bitRows) {
    const int64_t left = a.rows - first, rows = left < kLinear4bitRows ? left : kLinear4bitRows;
    a.code == kUint4 ? rounded_rows<T, true>(a, s, first, rows) : rounded_rows<T, false>(a, s, first, rows);
  }
}

}  // namespace

void linear_4bit_rounded(const Linear4bitArgs& args) {
  run_by_dtype(args, [](auto element, const Linear4bitArgs& a) { run<decltype(element)>(a); });
}

}  // namespace pykd::PYKD_LEVEL
