// y = x W^T + bias for a 4-bit weight in the layout `int4_r16` (linear_4bit_layout.h), activations kept as they are.
//
// Weights are decoded in registers, next to the multiply-adds (a decoded slab in cache would cost loads that the
// register tile needs for activations), used for all rows of a panel of activations, summed in float32 without their
// scale, and folded into the total once per group.
#include "cpu/linear_4bit_decode.h"
#include "cpu/linear_4bit_layout.h"
#include "cpu/linear_rows.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {
namespace {

// From so many rows on (for a codebook kSlabFromTable, whose decoding is dearer) weights are decoded once into a slab
// instead of once per panel.
#if defined(PYKD_LEVEL_avx512)
constexpr int64_t kSlabFrom = 96, kSlabFromTable = 96;
#elif defined(PYKD_LEVEL_avx2)
constexpr int64_t kSlabFrom = 8, kSlabFromTable = 6;
#else
constexpr int64_t kSlabFrom = 8, kSlabFromTable = 8;
#endif

// --- activations
// ------------------------------------------------------------------------------------------------------

// Panel: [padded_k][rows] floats, zero where the layout pads. Where the decoder leaves a weight multiplied by a power
// of two, the activation is divided by it: exact above 2^-102, and below that the product is under 2^-98 of the scale.
template <class T, bool kPlaced>
void pack_panel(const T* x, int64_t stride, int rows, const Linear4bitArgs& a, const Int4R16& s, float* panel) {
  float factor[8];
  for (int kk = 0; kk < 8; ++kk)
    factor[kk] = kPlaced && place(kk) < 28 ? bits_to_float(static_cast<uint32_t>(127 - place(kk)) << 23) : 1.0f;
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t first = g * s.group, size = s.size(g);
    const int64_t left = a.in_features - first, count = left < s.group ? left : s.group;
    for (int m = 0; m < rows; ++m) {
      const T* row = x + m * stride + first;
      for (int64_t k = 0; k < count; ++k) panel[k * rows + m] = to_float(row[k]) * factor[k & 7];
      for (int64_t k = count; k < size; ++k) panel[k * rows + m] = 0.0f;
    }
    panel += size * rows;
  }
}

// --- register tile
// ----------------------------------------------------------------------------------------------------

template <int kk, int NV, int MR, class Decoder>
PYKD_INLINE void multiply(const Decoder& decoder, const Words (&words)[NV], const float* x, F32 (&sum)[NV][MR]) {
  F32 w[NV];
  for (int i = 0; i < NV; ++i) w[i] = decoder.template decode<kk>(words[i], i);
  for (int m = 0; m < MR; ++m) {
    const F32 value = set1(x[kk * MR + m]);
    for (int i = 0; i < NV; ++i) sum[i][m] = fma(w[i], value, sum[i][m]);
  }
}

// total[m][row] of NV * kWidth outputs from `row` on, for the MR rows of a panel.
template <int NV, int MR, class Decoder>
void tile(Decoder decoder, const Int4R16& s, const uint8_t* strip, int row, const float* panel, Prefetch& stream,
          float* total) {
  Prefetch prefetch = stream;
  const uint8_t* block = strip + s.zero_bytes;
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t eights = s.size(g) / 8;
    const uint8_t* line = block + s.scale_bytes + row * 4;
    F32 sum[NV][MR];
    for (int i = 0; i < NV; ++i) {
      decoder.group(i, strip + g * kStrip + row + i * kWidth);
      for (int m = 0; m < MR; ++m) sum[i][m] = set1(0.0f);
    }
    for (int64_t e = 0; e < eights; ++e, line += 4 * kStrip, panel += 8 * MR) {
      Words words[NV];
      for (int i = 0; i < NV; ++i) words[i] = load_words(line + i * kWidth * 4);
      if constexpr (kPrefetches) prefetch.step<NV>();
      multiply<0>(decoder, words, panel, sum);
      multiply<1>(decoder, words, panel, sum);
      multiply<2>(decoder, words, panel, sum);
      multiply<3>(decoder, words, panel, sum);
      multiply<4>(decoder, words, panel, sum);
      multiply<5>(decoder, words, panel, sum);
      multiply<6>(decoder, words, panel, sum);
      multiply<7>(decoder, words, panel, sum);
    }
    for (int i = 0; i < NV; ++i) {
      const F32 scale = s.scales(block, row + i * kWidth);
      for (int m = 0; m < MR; ++m) {
        float* target = total + m * kStrip + row + i * kWidth;
        store(target, fma(sum[i][m], scale, load(target)));
      }
    }
    block += s.scale_bytes + eights * 4 * kStrip;
  }
  stream = prefetch;
}

// --- a strip of outputs for a panel of activations
// ---------------------------------------------------------------------

template <int MR, template <int> class Decoder>
PYKD_INLINE void strip_rows(const Linear4bitArgs& a, const Int4R16& s, const uint8_t* strip, const float* panel,
                            Prefetch& prefetch, float* total) {
  constexpr int NV = vectors(MR);
  for (int i = 0; i < MR * kStrip; ++i) total[i] = 0.0f;
  for (int row = 0; row < kStrip; row += NV * kWidth)
    tile<NV, MR>(Decoder<NV>(a.codebook), s, strip, row, panel, prefetch, total);
}

template <template <int> class Decoder, int MR = kRows>
void strip_panel(int rows, const Linear4bitArgs& a, const Int4R16& s, const uint8_t* strip, const float* panel,
                 Prefetch& prefetch, float* total) {
  if constexpr (MR > 1) {
    if (rows < MR) return strip_panel<Decoder, MR - 1>(rows, a, s, strip, panel, prefetch, total);
  }
  strip_rows<MR, Decoder>(a, s, strip, panel, prefetch, total);
}

// --- many rows: a decoded slab
// -------------------------------------------------------------------------------------------

// slab[k][kSlabOutputs] = weights of k in [first, last), scaled, for outputs from `row` on. (code - 8) * scale and
// (code - zero) * scale are exact in float32.
template <class Decoder>
void decode_slab(Decoder decoder, const Int4R16& s, const uint8_t* strip, int row, const uint8_t* zeros,
                 int64_t zero_step, int64_t first, int64_t last, float* slab) {
  int64_t g = first / s.padded_group;
  for (int64_t k = first; k < last; ++g) {
    const uint8_t* block = strip + s.block(g);
    const int64_t start = g * s.padded_group, end = start + s.size(g);
    F32 scale[kSlabVectors];
    for (int i = 0; i < kSlabVectors; ++i) {
      scale[i] = s.scales(block, row + i * kWidth);
      decoder.group(i, zeros + g * zero_step + row + i * kWidth);
    }
    const uint8_t* line = block + s.scale_bytes + (k - start) / 8 * (4 * kStrip) + row * 4;
    for (; k < last && k < end; k += 8, line += 4 * kStrip, slab += 8 * kSlabOutputs)
      for (int i = 0; i < kSlabVectors; ++i) {
        const Words words = load_words(line + i * kWidth * 4);
        float* to = slab + i * kWidth;
        store(to + 0 * kSlabOutputs, mul(decoder.template decode<0>(words, i), scale[i]));
        store(to + 1 * kSlabOutputs, mul(decoder.template decode<1>(words, i), scale[i]));
        store(to + 2 * kSlabOutputs, mul(decoder.template decode<2>(words, i), scale[i]));
        store(to + 3 * kSlabOutputs, mul(decoder.template decode<3>(words, i), scale[i]));
        store(to + 4 * kSlabOutputs, mul(decoder.template decode<4>(words, i), scale[i]));
        store(to + 5 * kSlabOutputs, mul(decoder.template decode<5>(words, i), scale[i]));
        store(to + 6 * kSlabOutputs, mul(decoder.template decode<6>(words, i), scale[i]));
        store(to + 7 * kSlabOutputs, mul(decoder.template decode<7>(words, i), scale[i]));
      }
  }
}

// --- the call
// -----------------------------------------------------------------------------------------------------------

template <class T, bool kPlaced>
void pack_panels(const Linear4bitArgs& a, const Int4R16& s, const Panels& panels, int64_t first) {
  const T* x = static_cast<const T*>(a.x) + first * a.x_stride;
  parallel_for(panels.count, grain(kRows * s.padded_k), a.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p)
      pack_panel<T, kPlaced>(x + panels.row(p) * a.x_stride, a.x_stride, panels.size(p), a, s,
                             a.scratch + panels.row(p) * s.padded_k);
  });
}

template <int NV>
struct SymmetricOf : Symmetric {
  using Symmetric::Symmetric;
};
template <int NV>
struct TableOf : Table {
  using Table::Table;
};

template <class T, template <int> class Decoder>
void few_rows(const Linear4bitArgs& a, const Int4R16& s, int64_t first, int64_t rows) {
  const Panels panels(rows, kRows);
  pack_panels<T, Decoder<1>::kPlaced>(a, s, panels, first);
  for_strips(s.strips, s.padded_k, a.threads, panels, [&](int64_t strip, int64_t begin, int64_t end) {
    alignas(64) float total[kRows * kStrip];
    const uint8_t* weights = a.packed + strip * s.strip_bytes;
    Prefetch prefetch = s.prefetch(weights, 0, s.groups, end - begin);
    for (int64_t p = begin; p < end; ++p) {
      strip_panel<Decoder>(panels.size(p), a, s, weights, a.scratch + panels.row(p) * s.padded_k, prefetch, total);
      write_out<T, kStrip>(a, total, strip * kStrip, first + panels.row(p), panels.size(p));
    }
  });
}

template <class T, class Decoder>
void many_rows(const Linear4bitArgs& a, const Int4R16& s, int64_t first, int64_t rows) {
  alignas(64) static const uint8_t eights[kStrip] = {8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8,
                                                     8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8};
  const Panels panels(rows, kRows);
  pack_panels<T, false>(a, s, panels, first);
  const int64_t slabs = (a.out_features + kSlabOutputs - 1) / kSlabOutputs;
  const bool asymmetric = a.code == kUint4;
  parallel_for(slabs, grain(kSlabOutputs * s.padded_k * rows), a.threads, [&](int64_t begin, int64_t end, int) {
    alignas(64) float slab[kSlab * kSlabOutputs];
    alignas(64) float total[kLinear4bitRows * kSlabOutputs];
    for (int64_t item = begin; item < end; ++item) {
      const uint8_t* strip = a.packed + item * kSlabOutputs / kStrip * s.strip_bytes;
      for (int64_t i = 0; i < rows * kSlabOutputs; ++i) total[i] = 0.0f;
      for (int64_t k = 0; k < s.padded_k; k += kSlab) {
        const int64_t last = k + kSlab < s.padded_k ? k + kSlab : s.padded_k;
        decode_slab(Decoder(a.codebook), s, strip, static_cast<int>(item * kSlabOutputs % kStrip),
                    asymmetric ? strip : eights, asymmetric ? kStrip : 0, k, last, slab);
        for (int64_t p = 0; p < panels.count; ++p)
          multiply_slab_rows(panels.size(p), slab, a.scratch + panels.row(p) * s.padded_k + k * panels.size(p),
                             last - k, total + panels.row(p) * kSlabOutputs);
      }
      write_out<T, kSlabOutputs>(a, total, item * kSlabOutputs, first, static_cast<int>(rows));
    }
  });
}

template <class T>
void run(const Linear4bitArgs& a) {
  const Int4R16 s(a);
  const int64_t slab_from = a.code == kCodebook4 ? kSlabFromTable : kSlabFrom;
  for (int64_t first = 0; first < a.rows; first += kLinear4bitRows) {
    const int64_t left = a.rows - first, rows = left < kLinear4bitRows ? left : kLinear4bitRows;
    if (rows >= slab_from && a.code == kCodebook4)
      many_rows<T, Table>(a, s, first, rows);
    else if (rows >= slab_from)
      many_rows<T, Shifted<kSlabVectors>>(a, s, first, rows);
    else if (a.code == kInt4)
      few_rows<T, SymmetricOf>(a, s, first, rows);
    else if (a.code == kUint4)
      few_rows<T, Shifted>(a, s, first, rows);
    else
      few_rows<T, TableOf>(a, s, first, rows);
  }
}

}  // namespace

void linear_4bit(const Linear4bitArgs& args) {
  run_by_dtype(args, [](auto element, const Linear4bitArgs& a) { run<decltype(element)>(a); });
}

}  // namespace pykd::PYKD_LEVEL
