// y = activation(x W^T + bias) for one row x and a pruned weight of 4-bit codes with a float16 scale per group: a
// bitmask and the kept codes, 1/8 + density / 2 + 2 / group bytes a weight where the dense layout int4_r16 has 1/2 + 2
// / group.
//
// Codes of 32 columns of a row begin at a byte, so that the next ones are found from the mask alone. With VBMI2 they
// are spread to their columns by one vpexpandb, over a vector of the code of zero, and looked up like dense ones: about
// 14 instructions for 32 weights, 3 to 4 cycles, i.e. 35-45 G weights a second on a core of 4.3 GHz, which needs 15-20
// GB/s at half the weights: as much as memory gives. Below VBMI2 the kept weights are visited one by one: as exact,
// and slower than dense codes at any density.
#include "cpu/linear_rows.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {
namespace {

constexpr int64_t kColumns = 32;  // decoded at a time
constexpr int kOutputs = 32;      // of a piece of work
constexpr int64_t kPrefetchBytes = 512;

#if defined(PYKD_LEVEL_avx512)

struct Codes {
  __m512 table;
  __m256i zero;
  explicit Codes(const Sparse4bitArgs& a)
      : table(_mm512_loadu_ps(a.table)), zero(_mm256_set1_epi8(static_cast<char>(a.zero_code))) {}
};
struct Sum {
  F32 low = set1(0.0f), high = set1(0.0f);
};
PYKD_INLINE void add_columns(const Codes& codes, uint32_t mask, const uint8_t* from, const float* x, Sum& sum) {
  const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i halves =  // of byte i of `from`: the low one in byte 2 i, the high one in byte 2 i + 1
      _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15));
  const __m256i spread = _mm256_mask_expand_epi8(codes.zero, mask, halves);
  const __m512i low = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(spread));
  const __m512i high = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(spread, 1));
  sum.low = fma({_mm512_permutexvar_ps(low, codes.table)}, load(x), sum.low);
  sum.high = fma({_mm512_permutexvar_ps(high, codes.table)}, load(x + kWidth), sum.high);
}
PYKD_INLINE void fold(Sum& total, const Sum& group, float scale) {
  total.low = fma(group.low, set1(scale), total.low);
  total.high = fma(group.high, set1(scale), total.high);
}
PYKD_INLINE float reduce(const Sum& sum) { return reduce_add(add(sum.low, sum.high)); }

#else

struct Codes {
  const float* table;
  explicit Codes(const Sparse4bitArgs& a) : table(a.table) {}
};
struct Sum {
  float even = 0.0f, odd = 0.0f;
};
PYKD_INLINE void add_columns(const Codes& codes, uint32_t mask, const uint8_t* from, const float* x, Sum& sum) {
  for (; mask != 0; ++from) {
    sum.even += codes.table[*from & 15] * x[__builtin_ctz(mask)];
    mask &= mask - 1;
    if (mask == 0) return;
    sum.odd += codes.table[*from >> 4] * x[__builtin_ctz(mask)];
    mask &= mask - 1;
  }
}
PYKD_INLINE void fold(Sum& total, const Sum& group, float scale) {
  total.even += group.even * scale;
  total.odd += group.odd * scale;
}
PYKD_INLINE float reduce(const Sum& sum) { return sum.even + sum.odd; }

#endif

float dot_row(const Sparse4bitArgs& a, const Codes& codes, int64_t row) {
  const int64_t groups = (a.in_features + a.group_size - 1) / a.group_size;
  const int64_t row_bytes = (a.in_features + kColumns - 1) / kColumns * 4;
  const uint8_t* bits = a.bitmask + row * row_bytes;
  const uint8_t* from = a.codes + a.offsets[row];
  const F16* scales = static_cast<const F16*>(a.scales) + row * groups;
  Sum total;
  for (int64_t first = 0; first < groups; first += kWidth) {
    const int64_t count = groups - first < kWidth ? groups - first : kWidth;
    float scale[kWidth];
    store(scale, count == kWidth ? load(scales + first) : load_n(scales + first, count, 0.0f));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = (first + i) * a.group_size;
      const int64_t end = begin + a.group_size < a.in_features ? begin + a.group_size : a.in_features;
      Sum group;
      for (int64_t column = begin; column < end; column += kColumns) {
        uint32_t mask;
        std::memcpy(&mask, bits + column / 8, 4);
        __builtin_prefetch(from + kPrefetchBytes);
        add_columns(codes, mask, from, a.x + column, group);
        from += (__builtin_popcount(mask) + 1) / 2;
      }
      fold(total, group, scale[i]);
    }
  }
  return reduce(total);
}

template <class T>
void run(const Sparse4bitArgs& a) {
  const Codes codes(a);
  parallel_for((a.out_features + kOutputs - 1) / kOutputs, grain(kOutputs * a.in_features), a.threads,
               [&](int64_t begin, int64_t end, int) {
                 for (int64_t piece = begin; piece < end; ++piece) {
                   const int64_t first = piece * kOutputs, left = a.out_features - first;
                   alignas(64) float total[kOutputs] = {};
                   for (int64_t i = 0; i < kOutputs && i < left; ++i) total[i] = dot_row(a, codes, first + i);
                   write_out<T, kOutputs>(a, total, first, 0, 1);
                 }
               });
}

}  // namespace

void sparse_4bit(const Sparse4bitArgs& args) {
  if (args.dtype == kFloat32)
    run<float>(args);
  else if (args.dtype == kBFloat16)
    run<BF16>(args);
  else
    run<F16>(args);
}

}  // namespace pykd::PYKD_LEVEL
