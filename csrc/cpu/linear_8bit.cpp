// y = x W^T + bias for an int8 weight in the layout `int8_r16` (pykd/ops/int8_r16.py):
//
//   strip  32 output rows: 32 float32 scales, 32 int32 starting sums (see linear_8bit_codes.h), then a pair of 64-byte
//          lines per 4 k: rows 0-15, rows 16-31, the four k of a row adjacent
//
// so that a thread reads its weights as one sequential stream. With `rounds`, activations become int8 with one scale
// per row (w8a8), or with the scale and zero point that are given (w8a8_static), and products are summed as integers;
// without (w8a16) they are kept and weights become floats, in registers for few rows, else in a slab that all panels of
// activations use.
#include "cpu/linear_8bit_codes.h"
#include "cpu/linear_rows.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {
namespace {

constexpr int64_t kHeader = kStrip * 8;  // bytes of scales and starting sums
constexpr int64_t kStep = kStrip * 4;    // bytes of 4 k of a strip

// w8a16: rows from which a slab costs less than decoding once per panel.
#if defined(PYKD_LEVEL_avx512)
constexpr int64_t kSlabFrom = 96;
#else
constexpr int64_t kSlabFrom = 8;
#endif

struct Shape {
  int64_t padded_k, strips, strip_bytes;
  explicit Shape(const Linear8bitArgs& a)
      : padded_k((a.in_features + 3) / 4 * 4),
        strips((a.out_features + kStrip - 1) / kStrip),
        strip_bytes(kHeader + padded_k * kStrip) {}
};

F32 scales_at(const uint8_t* strip, int row) { return load(reinterpret_cast<const float*>(strip) + row); }
I32 starts_at(const uint8_t* strip, int row) {
  return load_i32(reinterpret_cast<const int32_t*>(strip + kStrip * 4) + row);
}

// --- w8a8: integer sums ---------------------------------------------------------------------------------------------

// k at a time: the weights of a strip, 16 KB, stay in the first-level cache while all panels use them.
constexpr int64_t kBlock = 512;

// sums[m][row ...] += NV * kWidth outputs of a block for the MR rows of a panel of codes [quads][MR][4]; with `starts`,
// of a strip's first block, = starts + those.
template <int NV, int MR>
void code_tile(const uint8_t* line, const uint8_t* starts, int row, int64_t quads, const uint8_t* panel,
               Prefetch& stream, int32_t* sums) {
  Prefetch prefetch = stream;
  I32 sum[NV][MR];
  for (int i = 0; i < NV; ++i)
    for (int m = 0; m < MR; ++m) {
      const int at = row + i * kWidth;
      sum[i][m] = starts ? start_sum(starts + at * 4) : load_i32(sums + m * kStrip + at);
    }
  line += row * 4;
  for (int64_t q = 0; q < quads; ++q, line += kStep, panel += 4 * MR) {
    Codes w[NV];
    for (int i = 0; i < NV; ++i) w[i] = load_codes(line + i * kWidth * 4);
    prefetch.step<NV>();
    for (int m = 0; m < MR; ++m) {
      const Quad quad = load_quad(panel + 4 * m);
      for (int i = 0; i < NV; ++i) sum[i][m] = dot(sum[i][m], w[i], quad);
    }
  }
  stream = prefetch;
  for (int i = 0; i < NV; ++i)
    for (int m = 0; m < MR; ++m) store_i32(sums + m * kStrip + row + i * kWidth, sum[i][m]);
}

template <int MR = kCodeRows>
void code_panel(int rows, const uint8_t* line, const uint8_t* starts, int64_t quads, const uint8_t* panel,
                Prefetch& prefetch, int32_t* sums) {
  if constexpr (MR > 1) {
    if (rows < MR) return code_panel<MR - 1>(rows, line, starts, quads, panel, prefetch, sums);
  }
  constexpr int NV = code_vectors(MR);
  for (int row = 0; row < kStrip; row += NV * kWidth)
    code_tile<NV, MR>(line, starts, row, quads, panel, prefetch, sums);
}

// (sums[rows][kStrip] - input_zero * sums of the weights) * row_scales * the strip's scales + bias -> y. The sums of
// the weights are the starting sums over -128; their product with a zero point need not fit in 32 bits, but is a
// float32 that is exact up to 2^24.
template <class T>
void write_sums(const Linear8bitArgs& a, const int32_t* sums, const float* row_scales, const uint8_t* strip,
                int64_t first, int64_t row, int rows) {
  alignas(64) float total[kCodeRows * kStrip];
  for (int at = 0; at < kStrip; at += kWidth) {
    const F32 scale = scales_at(strip, at);
    const F32 shift = mul(to_f32(starts_at(strip, at)), set1(static_cast<float>(a.input_zero) / 128.0f));
    for (int m = 0; m < rows; ++m) {
      const F32 sum = add(to_f32(load_i32(sums + m * kStrip + at)), shift);
      store(total + m * kStrip + at, mul(mul(sum, set1(row_scales[m])), scale));
    }
  }
  write_out<T, kStrip>(a, total, first, row, rows);
}

template <class T>
void rounded_rows(const Linear8bitArgs& a, const Shape& s, int64_t first, int64_t rows) {
  const Panels panels(rows, kCodeRows);
  const T* x = static_cast<const T*>(a.x) + first * a.x_stride;
  float* row_scales = a.scratch;
  uint8_t* codes = reinterpret_cast<uint8_t*>(a.scratch + rows);
  const int64_t fresh = a.rounded ? 0 : panels.count;
  parallel_for(fresh, grain(kCodeRows * s.padded_k), a.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t m = panels.row(p); m < panels.row(p + 1); ++m)
        row_scales[m] = round_row(x + m * a.x_stride, a.in_features, s.padded_k, 4 * panels.size(p),
                                  codes + panels.row(p) * s.padded_k + (m - panels.row(p)) * 4, a.input_scale,
                                  static_cast<float>(a.input_zero));
  });
  for_strips(s.strips, s.padded_k, a.threads, panels, [&](int64_t item, int64_t begin, int64_t end) {
    alignas(64) int32_t sums[kLinear8bitRows * kStrip];
    const uint8_t* strip = a.packed + item * s.strip_bytes;
    const int64_t tiles = (end - begin) * kStrip / (code_vectors(panels.size(begin)) * kWidth);
    for (int64_t k = 0; k < s.padded_k; k += kBlock) {
      const int64_t count = s.padded_k - k < kBlock ? s.padded_k - k : kBlock;
      const uint8_t* block = strip + kHeader + k * kStrip;
      Prefetch prefetch = {block + count * kStrip, tiles < kStep ? kStep / tiles : 1};
      for (int64_t p = begin; p < end; ++p) {
        const int64_t row = panels.row(p);
        code_panel(panels.size(p), block, k == 0 ? strip + kStrip * 4 : nullptr, count / 4,
                   codes + row * s.padded_k + k * panels.size(p), prefetch, sums + row * kStrip);
      }
    }
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = panels.row(p);
      write_sums<T>(a, sums + row * kStrip, row_scales + row, strip, item * kStrip, first + row, panels.size(p));
    }
  });
}

// --- w8a16: float32 sums --------------------------------------------------------------------------------------------

// Panels of x as floats [padded_k][rows of the panel], zero beyond in_features.
template <class T>
void pack_panels(const Linear8bitArgs& a, const Shape& s, const Panels& panels, int64_t first) {
  const T* x = static_cast<const T*>(a.x) + first * a.x_stride;
  parallel_for(panels.count, grain(kRows * s.padded_k), a.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const int rows = panels.size(p);
      float* panel = a.scratch + panels.row(p) * s.padded_k;
      for (int m = 0; m < rows; ++m) {
        const T* row = x + (panels.row(p) + m) * a.x_stride;
        for (int64_t k = 0; k < a.in_features; ++k) panel[k * rows + m] = to_float(row[k]);
        for (int64_t k = a.in_features; k < s.padded_k; ++k) panel[k * rows + m] = 0.0f;
      }
    }
  });
}

template <int kk, int NV, int MR>
PYKD_INLINE void multiply(const Codes (&codes)[NV], const float* x, F32 (&sum)[NV][MR]) {
  F32 w[NV];
  for (int i = 0; i < NV; ++i) w[i] = decode<kk>(codes[i]);
  for (int m = 0; m < MR; ++m) {
    const F32 value = set1(x[kk * MR + m]);
    for (int i = 0; i < NV; ++i) sum[i][m] = fma(w[i], value, sum[i][m]);
  }
}

template <int NV, int MR>
void float_tile(const uint8_t* strip, int row, int64_t quads, const float* panel, Prefetch& stream, float* total) {
  Prefetch prefetch = stream;
  F32 sum[NV][MR];
  for (int i = 0; i < NV; ++i)
    for (int m = 0; m < MR; ++m) sum[i][m] = set1(0.0f);
  const uint8_t* line = strip + kHeader + row * 4;
  for (int64_t q = 0; q < quads; ++q, line += kStep, panel += 4 * MR) {
    Codes codes[NV];
    for (int i = 0; i < NV; ++i) codes[i] = load_codes(line + i * kWidth * 4);
    if constexpr (kPrefetches) prefetch.step<NV>();
    multiply<0>(codes, panel, sum);
    multiply<1>(codes, panel, sum);
    multiply<2>(codes, panel, sum);
    multiply<3>(codes, panel, sum);
  }
  stream = prefetch;
  for (int i = 0; i < NV; ++i)
    for (int m = 0; m < MR; ++m)
      store(total + m * kStrip + row + i * kWidth, mul(sum[i][m], scales_at(strip, row + i * kWidth)));
}

template <int MR = kRows>
void float_panel(int rows, const uint8_t* strip, int64_t quads, const float* panel, Prefetch& prefetch, float* total) {
  if constexpr (MR > 1) {
    if (rows < MR) return float_panel<MR - 1>(rows, strip, quads, panel, prefetch, total);
  }
  constexpr int NV = vectors(MR);
  for (int row = 0; row < kStrip; row += NV * kWidth) float_tile<NV, MR>(strip, row, quads, panel, prefetch, total);
}

template <class T>
void few_rows(const Linear8bitArgs& a, const Shape& s, int64_t first, int64_t rows) {
  const Panels panels(rows, kRows);
  pack_panels<T>(a, s, panels, first);
  for_strips(s.strips, s.padded_k, a.threads, panels, [&](int64_t strip, int64_t begin, int64_t end) {
    alignas(64) float total[kRows * kStrip];
    const uint8_t* weights = a.packed + strip * s.strip_bytes;
    const int64_t tiles = end - begin;
    Prefetch prefetch = {weights + (tiles > 1 ? s.strip_bytes : kAhead), kStep / tiles + 1};
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = panels.row(p);
      float_panel(panels.size(p), weights, s.padded_k / 4, a.scratch + row * s.padded_k, prefetch, total);
      write_out<T, kStrip>(a, total, strip * kStrip, first + row, panels.size(p));
    }
  });
}

// slab[k][kSlabOutputs] = weights of k in [0, 4 * quads) before scaling.
void decode_slab(const uint8_t* line, int64_t quads, float* slab) {
  for (int64_t q = 0; q < quads; ++q, line += kStep, slab += 4 * kSlabOutputs)
    for (int i = 0; i < kSlabVectors; ++i) {
      const Codes codes = load_codes(line + i * kWidth * 4);
      store(slab + i * kWidth, decode<0>(codes));
      store(slab + i * kWidth + kSlabOutputs, decode<1>(codes));
      store(slab + i * kWidth + 2 * kSlabOutputs, decode<2>(codes));
      store(slab + i * kWidth + 3 * kSlabOutputs, decode<3>(codes));
    }
}

template <class T>
void many_rows(const Linear8bitArgs& a, const Shape& s, int64_t first, int64_t rows) {
  const Panels panels(rows, kRows);
  pack_panels<T>(a, s, panels, first);
  const int64_t slabs = (a.out_features + kSlabOutputs - 1) / kSlabOutputs;
  parallel_for(slabs, grain(kSlabOutputs * s.padded_k * rows), a.threads, [&](int64_t begin, int64_t end, int) {
    alignas(64) float slab[kSlab * kSlabOutputs];
    alignas(64) float total[kLinear8bitRows * kSlabOutputs];
    for (int64_t item = begin; item < end; ++item) {
      const uint8_t* strip = a.packed + item * kSlabOutputs / kStrip * s.strip_bytes;
      const int row = static_cast<int>(item * kSlabOutputs % kStrip);
      for (int64_t i = 0; i < rows * kSlabOutputs; ++i) total[i] = 0.0f;
      for (int64_t k = 0; k < s.padded_k; k += kSlab) {
        const int64_t count = s.padded_k - k < kSlab ? s.padded_k - k : kSlab;
        decode_slab(strip + kHeader + k * kStrip + row * 4, count / 4, slab);
        for (int64_t p = 0; p < panels.count; ++p)
          multiply_slab_rows(panels.size(p), slab, a.scratch + panels.row(p) * s.padded_k + k * panels.size(p), count,
                             total + panels.row(p) * kSlabOutputs);
      }
      for (int i = 0; i < kSlabVectors; ++i) {
        const F32 scale = scales_at(strip, row + i * kWidth);
        float* at = total + i * kWidth;
        for (int64_t m = 0; m < rows; ++m) store(at + m * kSlabOutputs, mul(load(at + m * kSlabOutputs), scale));
      }
      write_out<T, kSlabOutputs>(a, total, item * kSlabOutputs, first, static_cast<int>(rows));
    }
  });
}

// --- the call -------------------------------------------------------------------------------------------------------

template <class T>
void run(const Linear8bitArgs& a) {
  const Shape s(a);
  for (int64_t first = 0; first < a.rows; first += kLinear8bitRows) {
    const int64_t left = a.rows - first, rows = left < kLinear8bitRows ? left : kLinear8bitRows;
    if (a.rounds)
      rounded_rows<T>(a, s, first, rows);
    else if (rows < kSlabFrom)
      few_rows<T>(a, s, first, rows);
    else
      many_rows<T>(a, s, first, rows);
  }
}

}  // namespace

void linear_8bit(const Linear8bitArgs& args) {
  run_by_dtype(args, [](auto element, const Linear8bitArgs& a) { run<decltype(element)>(a); });
}

}  // namespace pykd::PYKD_LEVEL
