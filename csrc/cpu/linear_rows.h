// What linear layers over packed weights share: rows spread over panels, the float32 register tile, and the way out.
#pragma once

#include "cpu/activation.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {

constexpr int kStrip = 32;  // outputs whose weights a thread reads as one sequential stream

// Float32 register tile: vectors(rows) vectors of outputs x at most kRows rows of activations.
#if defined(PYKD_LEVEL_avx512)
constexpr int kRows = 12;  // 2 x 12 accumulators of 32 registers
constexpr int vectors(int) { return 2; }
#elif defined(PYKD_LEVEL_avx2)
constexpr int kRows = 6;  // 2 x 6 accumulators of 16 registers
constexpr int vectors(int rows) { return rows <= 2 ? 4 : 2; }
#else
constexpr int kRows = 4;
constexpr int vectors(int) { return 2; }
#endif

// Calls run(element, args) with an element of the activations' type, and with scratch on the stack where the caller
// brought none because so little is needed.
template <class Args, class Run>
void run_by_dtype(Args args, const Run& run) {
  alignas(64) float small[kSmallScratch];
  if (!args.scratch) args.scratch = small;
  if (args.dtype == kFloat32)
    run(float{}, args);
  else if (args.dtype == kBFloat16)
    run(BF16{}, args);
  else
    run(F16{}, args);
}

// `rows` rows spread evenly over panels of at most `most`.
struct Panels {
  int64_t rows, count;
  PYKD_INLINE Panels(int64_t rows, int64_t most) : rows(rows), count((rows + most - 1) / most) {}
  PYKD_INLINE int64_t row(int64_t p) const { return rows * p / count; }
  PYKD_INLINE int size(int64_t p) const { return static_cast<int>(row(p + 1) - row(p)); }
};

// Items for a thread to be worth waking, when one item is `work` multiply-adds.
PYKD_INLINE int64_t grain(int64_t work) { return 1 + (1 << 15) / (work + 1); }

// Calls fn(strip, first panel, last panel) for strips of padded_k inputs: for few strips, threads share a strip and
// split its panels.
template <class Fn>
void for_strips(int64_t strips, int64_t padded_k, int threads, const Panels& panels, const Fn& fn) {
  const int64_t pieces = strips >= 4 * threads ? 1 : panels.count;
  parallel_for(strips * pieces, grain(kStrip * padded_k * panels.rows / pieces), threads,
               [&](int64_t begin, int64_t end, int) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t piece = item % pieces;
                   fn(item / pieces, panels.count * piece / pieces, panels.count * (piece + 1) / pieces);
                 }
               });
}

// What a thread's stream of weights continues with is prefetched into the second-level cache, spread evenly over all
// tiles that use the weights before it: left to the first panel, or to the hardware, memory would wait for the
// arithmetic of the other panels and these for memory.
struct Prefetch {
  const uint8_t* next;
  int64_t stride;  // bytes a tile asks for in each of its steps
  template <int NV>
  PYKD_INLINE void step() {
    __builtin_prefetch(next, 0, 2);
    if (NV * kWidth == kStrip && stride > 64) __builtin_prefetch(next + 64, 0, 2);  // a lone panel
    next += stride;
  }
};

// How far ahead of itself a lone panel asks for its weights.
constexpr int64_t kAhead = 8192;

// Whether rows that are not rounded ask for weights in advance: not where the arithmetic takes longer than they do.
constexpr bool kPrefetches = kWidth == 16;

// --- many rows: a slab of decoded weights ---------------------------------------------------------------------------

constexpr int64_t kSlab = 256;   // k at a time: 16 outputs x 256 k floats are half of a 32 KB first-level cache
constexpr int kSlabVectors = 2;  // outputs of a slab, in vectors
constexpr int kSlabOutputs = kSlabVectors * kWidth;

// total[m][kSlabOutputs] += panel[k][m] * slab[k]
template <int MR>
void multiply_slab(const float* slab, const float* panel, int64_t count, float* total) {
  F32 sum[kSlabVectors][MR];
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < kSlabVectors; ++i) sum[i][m] = load(total + m * kSlabOutputs + i * kWidth);
  for (int64_t k = 0; k < count; ++k, slab += kSlabOutputs, panel += MR) {
    F32 w[kSlabVectors];
    for (int i = 0; i < kSlabVectors; ++i) w[i] = load(slab + i * kWidth);
    for (int m = 0; m < MR; ++m) {
      const F32 value = set1(panel[m]);
      for (int i = 0; i < kSlabVectors; ++i) sum[i][m] = fma(w[i], value, sum[i][m]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < kSlabVectors; ++i) store(total + m * kSlabOutputs + i * kWidth, sum[i][m]);
}

template <int MR = kRows>
void multiply_slab_rows(int rows, const float* slab, const float* panel, int64_t count, float* total) {
  if constexpr (MR > 1) {
    if (rows < MR) return multiply_slab_rows<MR - 1>(rows, slab, panel, count, total);
  }
  multiply_slab<MR>(slab, panel, count, total);
}

// --- the way out ----------------------------------------------------------------------------------------------------

template <class Args>
float bias_at(const Args& a, int64_t i) {
  if (!a.bias) return 0.0f;
  if (a.bias_dtype == kFloat32) return static_cast<const float*>(a.bias)[i];
  if (a.bias_dtype == kBFloat16) return to_float(static_cast<const BF16*>(a.bias)[i]);
  return to_float(static_cast<const F16*>(a.bias)[i]);
}

// activation of total[rows][Outputs] + bias -> y[row ...][first ...]
template <class T, int Outputs, class Args>
void write_out(const Args& a, const float* total, int64_t first, int64_t row, int rows) {
  const int64_t left = a.out_features - first;
  const int count = static_cast<int>(left < Outputs ? left : Outputs);
  float bias[Outputs];
  for (int i = 0; i < count; ++i) bias[i] = bias_at(a, first + i);
  for (int m = 0; m < rows; ++m, total += Outputs) {
    T* y = static_cast<T*>(a.y) + (row + m) * a.out_features + first;
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) store(y + i, activate(add(load(total + i), load(bias + i)), a.activation));
    if (i < count)
      store_n(y + i, activate(add(load_n(total + i, count - i, 0.0f), load_n(bias + i, count - i, 0.0f)), a.activation),
              count - i);
  }
}

}  // namespace pykd::PYKD_LEVEL
