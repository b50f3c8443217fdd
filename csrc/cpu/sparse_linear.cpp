// Linear layer for 1 to 4 rows over a bitmask + values weight, read in its canonical layout:
// y[m, n] = sum_k x[m, k] W[n, k] + bias[n]. More rows, and sparser weights, go to csrc/cpu/sparse_panels.cpp.
//
// One byte of the bitmask (two at 16 lanes) says which of kUnit neighbouring columns of a row are kept. `expand` puts
// the next popcount(mask) values into those lanes and zero into the others, so that one vector multiply-add with the
// same columns of x does the work of kUnit weights. No activation is gathered and nothing but a row offset is
// precomputed; memory traffic is density * sizeof(value) + 1/8 byte a weight instead of 4.
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {
namespace {

constexpr int kUnit = kWidth == 16 ? 16 : 8;  // columns expanded at once
constexpr int kParts = kUnit / kWidth;        // vectors in a unit
constexpr int kUnitBytes = kUnit / 8;
constexpr int64_t kCellsPerPiece = 1 << 17;  // weights below which waking another thread costs more than it saves

constexpr int kPrefetchLines = 4, kPrefetchBytes = 1024;

struct Unit {
  F32 part[kParts];
};

#if defined(PYKD_LEVEL_avx2)

// For each mask: which value goes to which lane; lanes without a value have the sign bit set.
struct ExpandTable {
  alignas(32) int32_t lane[256][8];
  constexpr ExpandTable() : lane() {
    for (int mask = 0; mask < 256; ++mask)
      for (int bit = 0, next = 0; bit < 8; ++bit) lane[mask][bit] = (mask >> bit & 1) ? next++ : INT32_MIN;
  }
};
constexpr ExpandTable kExpandTable;

// May read kUnit elements at `values`, whatever the mask.
template <class T>
PYKD_INLINE Unit expand(const T* values, uint32_t mask) {
  const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExpandTable.lane[mask]));
  const __m256 spread = _mm256_permutevar8x32_ps(load(values).v, lanes);
  return {{{_mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes))}}};
}

#elif defined(PYKD_LEVEL_avx512)

template <class T>
PYKD_INLINE Unit expand(const T* values, uint32_t mask) {
  // vexpandps waits for the old contents of its destination even when it zeroes the other lanes (5.4 cycles instead of
  // 1.2 when a register is reused, measured on Zen 5); clearing the register first breaks that dependency.
  __m512 lanes;
  asm("vpxord %0, %0, %0\n\tvexpandps %1, %0%{%2%}%{z%}"
      : "=&v"(lanes)
      : "v"(load(values).v), "Yk"(static_cast<__mmask16>(mask)));
  return {{{lanes}}};
}

#else

template <class T>
PYKD_INLINE Unit expand(const T* values, uint32_t mask) {
  Unit unit;
  for (int bit = 0; bit < kUnit; ++bit) unit.part[bit] = {(mask >> bit & 1) ? to_float(*values++) : 0.0f};
  return unit;
}

#endif

PYKD_INLINE int count(uint32_t mask) { return __builtin_popcount(mask); }

// Calls use(column, unit) for the units of `bytes` mask bytes at `bits`; returns the first value not used.
template <class T, class Use>
PYKD_INLINE const T* for_units(const uint8_t* bits, int64_t bytes, const T* value, const Use& use) {
  int64_t byte = 0;
  for (; byte + 8 <= bytes; byte += 8) {
    uint64_t word;
    std::memcpy(&word, bits + byte, 8);
    for (int line = 0; line < kPrefetchLines; ++line)
      __builtin_prefetch(reinterpret_cast<const char*>(value) + kPrefetchBytes + 64 * line);
#pragma GCC unroll 8
    for (int part = 0; part < 8 / kUnitBytes; ++part) {
      const uint32_t mask = static_cast<uint32_t>(word >> (part * kUnit)) & ((1u << kUnit) - 1);
      const int before = part == 0 ? 0 : __builtin_popcountll(word << (64 - part * kUnit));
      use(byte * 8 + part * kUnit, part, expand(value + before, mask));
    }
    value += __builtin_popcountll(word);
  }
  for (; byte < bytes; byte += kUnitBytes) {
    uint32_t mask = bits[byte];
    if (kUnitBytes == 2 && byte + 1 < bytes) mask |= static_cast<uint32_t>(bits[byte + 1]) << 8;
    use(byte * 8, 0, expand(value, mask));
    value += count(mask);
  }
  return value;
}

template <class T>
PYKD_INLINE const T* row_values(const SparseLinearArgs& args, int64_t row) {
  if (row < args.tail_row) return static_cast<const T*>(args.values) + args.offsets[row];
  return static_cast<const T*>(args.tail) + (args.offsets[row] - args.offsets[args.tail_row]);
}

// kRows dot products with each expanded unit.
template <class T, int kRows>
void dot_rows(const SparseLinearArgs& args, int64_t first, int64_t last) {
  constexpr int kChains = kRows == 1 ? 4 : 2;  // independent sums that hide the latency of the multiply-add
  const int64_t bytes = (args.in_features + 7) / 8;
  for (int64_t row = first; row < last; ++row) {
    F32 sums[kRows][kChains][kParts];
    for (auto& chains : sums)
      for (auto& chain : chains)
        for (F32& sum : chain) sum = set1(0.0f);
    for_units(args.bitmask + row * bytes, bytes, row_values<T>(args, row),
              [&](int64_t column, int index, const Unit& unit) {
#pragma GCC unroll 4
                for (int m = 0; m < kRows; ++m)
                  for (int part = 0; part < kParts; ++part) {
                    F32& sum = sums[m][index % kChains][part];
                    sum = fma(unit.part[part], load(args.x + m * args.x_stride + column + part * kWidth), sum);
                  }
              });
    for (int m = 0; m < kRows; ++m) {
      float total = args.bias ? args.bias[row] : 0.0f;
      for (int part = 0; part < kParts; ++part) {
        F32 sum = sums[m][0][part];
        for (int chain = 1; chain < kChains; ++chain) sum = add(sum, sums[m][chain][part]);
        total += reduce_add(sum);
      }
      args.y[m * args.out_features + row] = total;
    }
  }
}

template <class T>
void linear(const SparseLinearArgs& args) {
  parallel_for(args.out_features, kCellsPerPiece / (args.in_features + 1) + 1, args.threads,
               [&](int64_t first, int64_t last, int) {
                 if (args.rows == 1) return dot_rows<T, 1>(args, first, last);
                 if (args.rows == 2) return dot_rows<T, 2>(args, first, last);
                 if (args.rows == 3) return dot_rows<T, 3>(args, first, last);
                 dot_rows<T, 4>(args, first, last);
               });
}

}  // namespace

void sparse_linear(const SparseLinearArgs& args) {
  if (args.value_dtype == kFloat32)
    linear<float>(args);
  else if (args.value_dtype == kBFloat16)
    linear<BF16>(args);
  else
    linear<F16>(args);
}

}  // namespace pykd::PYKD_LEVEL
