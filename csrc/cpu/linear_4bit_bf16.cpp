// y = x W^T + bias for a 4-bit weight in the layout `int4_r16` (linear_4bit_layout.h) and bfloat16 activations, at the
// level avx512_bf16, whose vdpbf16ps multiplies 32 pairs of bfloat16 and adds them up in float32: twice the products of
// a float32 multiply-add.
//
// What is multiplied is exact: code - 8 and code - zero are whole numbers below 16, and a codebook comes here only if
// its values are bfloat16 (those of NF4 and FP4 are not). Scales multiply the float32 sum of a group. Numbers below
// 2^-126, which the instruction takes for 0, are all that is lost. Other calls are those of the level avx512.
#include "cpu/linear_4bit_decode.h"
#include "cpu/linear_4bit_layout.h"
#include "cpu/linear_rows.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {
namespace {

constexpr int kVectors = kStrip / kWidth;
// 2 x 8 sums: with fewer, the latency of vdpbf16ps shows; more do not gain. Totals of groups are in memory.
constexpr int kPairRows = 8;
// Weights of a strip that all panels use before those after them, half of them in a second-level cache of 512 KB.
// Smaller pieces, which stay in the first level, lose 2-5 % to the totals that each of them reads and writes.
constexpr int64_t kPieceBytes = 262144;

// --- activations ----------------------------------------------------------------------------------------------------

// A word of 8 codes, shifted right by 4 t, has two codes where each of its halves begins: k0 and k0 + 2 for t = 0, and
// so on. Pairs of activations are in the same order.
constexpr int kPairs = 4;
alignas(16) constexpr uint8_t kPairOrder[16] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};

// Panel: [padded_k / 2][rows] pairs, zero where the layout pads.
void pack_panel(const BF16* x, int64_t stride, int rows, const Linear4bitArgs& a, const Int4R16& s, uint32_t* panel) {
  const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(kPairOrder));
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t first = g * s.group, size = s.size(g);
    const int64_t left = a.in_features - first, count = left < s.group ? left : s.group;
    for (int m = 0; m < rows; ++m) {
      const BF16* row = x + m * stride + first;
      for (int64_t k = 0; k < size; k += 8) {
        BF16 eight[8] = {};
        std::memcpy(eight, row + k, static_cast<size_t>(k + 8 <= count ? 8 : count - k) * sizeof(BF16));
        uint32_t pairs[kPairs];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(pairs),
                         _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(eight)), order));
        for (int t = 0; t < kPairs; ++t) panel[(k / 8 * kPairs + t) * rows + m] = pairs[t];
      }
    }
    panel += size / 2 * rows;
  }
}

void pack_panels(const Linear4bitArgs& a, const Int4R16& s, const Panels& panels, int64_t first, uint32_t* scratch) {
  const BF16* x = static_cast<const BF16*>(a.x) + first * a.x_stride;
  parallel_for(panels.count, grain(kPairRows * s.padded_k), a.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p)
      pack_panel(x + panels.row(p) * a.x_stride, a.x_stride, panels.size(p), a, s,
                 scratch + panels.row(p) * s.padded_k / 2);
  });
}

// --- decoders: words of codes to pairs of weights -------------------------------------------------------------------

template <int t>
PYKD_INLINE __m512i codes_at(Words w) {
  return t == 0 ? w.v : _mm512_srli_epi16(w.v, 4 * t);
}

// A table of 16 values twice: the permutation reads five bits, of which the fifth is another code's.
struct Values {
  __m512i table;
  explicit Values(const float* codebook) {
    BF16 values[32];
    for (int i = 0; i < 32; ++i)
      values[i] = from_float<BF16>(codebook ? codebook[i % 16] : static_cast<float>(i % 16 - 8));
    table = _mm512_loadu_si512(values);
  }
  PYKD_INLINE void group(int, const uint8_t*) {}
  template <int t>
  PYKD_INLINE __m512bh decode(Words w, int) const {
    return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(codes_at<t>(w), table));
  }
};

// code - zero, from -15 to 15, as five bits: the entry of a table of 32.
struct Differences {
  __m512i table, zero[kVectors];
  explicit Differences(const float*) {
    BF16 values[32];
    for (int i = 0; i < 32; ++i) values[i] = from_float<BF16>(static_cast<float>(i < 16 ? i : i - 32));
    table = _mm512_loadu_si512(values);
  }
  PYKD_INLINE void group(int i, const uint8_t* zeros) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
    zero[i] = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
  }
  template <int t>
  PYKD_INLINE __m512bh decode(Words w, int i) const {
    const __m512i code = t == 3 ? codes_at<t>(w) : _mm512_and_si512(codes_at<t>(w), _mm512_set1_epi16(15));
    return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(_mm512_sub_epi16(code, zero[i]), table));
  }
};

// --- register tile --------------------------------------------------------------------------------------------------

struct Piece {  // groups [begin, end) of a strip, for a panel of activations
  const Int4R16& s;
  const uint8_t* strip;
  int64_t begin, end;
  const uint32_t* pairs;
};

template <int t, int MR, class Decoder>
PYKD_INLINE void multiply(const Decoder& decoder, const Words (&words)[kVectors], const uint32_t* pairs,
                          __m512 (&sum)[kVectors][MR]) {
  __m512bh w[kVectors];
  for (int i = 0; i < kVectors; ++i) w[i] = decoder.template decode<t>(words[i], i);
  for (int m = 0; m < MR; ++m) {
    const auto pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pairs[t * MR + m])));
    for (int i = 0; i < kVectors; ++i) sum[i][m] = _mm512_dpbf16_ps(sum[i][m], w[i], pair);
  }
}

// total[m][kStrip] += outputs of a piece for the MR rows of its panel.
template <int MR, class Decoder>
void tile(Decoder decoder, const Piece& piece, Prefetch& stream, float* total) {
  Prefetch prefetch = stream;
  const uint32_t* pairs = piece.pairs;
  const uint8_t* block = piece.strip + piece.s.block(piece.begin);
  for (int64_t g = piece.begin; g < piece.end; ++g) {
    const int64_t eights = piece.s.size(g) / 8;
    const uint8_t* line = block + piece.s.scale_bytes;
    __m512 sum[kVectors][MR];
    for (int i = 0; i < kVectors; ++i) {
      decoder.group(i, piece.strip + g * kStrip + i * kWidth);
      for (int m = 0; m < MR; ++m) sum[i][m] = _mm512_setzero_ps();
    }
    for (int64_t e = 0; e < eights; ++e, line += 4 * kStrip, pairs += kPairs * MR) {
      Words words[kVectors];
      for (int i = 0; i < kVectors; ++i) words[i] = load_words(line + i * kWidth * 4);
      prefetch.step<kVectors>();
      multiply<0>(decoder, words, pairs, sum);
      multiply<1>(decoder, words, pairs, sum);
      multiply<2>(decoder, words, pairs, sum);
      multiply<3>(decoder, words, pairs, sum);
    }
    for (int i = 0; i < kVectors; ++i) {
      const F32 scale = piece.s.scales(block, i * kWidth);
      for (int m = 0; m < MR; ++m) {
        float* target = total + m * kStrip + i * kWidth;
        store(target, fma({sum[i][m]}, scale, load(target)));
      }
    }
    block = line;
  }
  stream = prefetch;
}

template <class Decoder, int MR = kPairRows>
void panel(int rows, const Decoder& decoder, const Piece& piece, Prefetch& prefetch, float* total) {
  if constexpr (MR > 1) {
    if (rows < MR) return panel<Decoder, MR - 1>(rows, decoder, piece, prefetch, total);
  }
  tile<MR>(decoder, piece, prefetch, total);
}

// --- the call -------------------------------------------------------------------------------------------------------

template <class Decoder>
void run(const Linear4bitArgs& a, const Int4R16& s, uint32_t* scratch, int64_t first, int64_t rows) {
  const Decoder decoder(a.codebook);
  const Panels panels(rows, kPairRows);
  pack_panels(a, s, panels, first, scratch);
  const int64_t group_bytes = s.scale_bytes + s.padded_group * (kStrip / 2);
  const int64_t step = group_bytes < kPieceBytes ? kPieceBytes / group_bytes : 1;
  for_strips(s.strips, s.padded_k, a.threads, panels, [&](int64_t item, int64_t begin, int64_t end) {
    alignas(64) float total[kLinear4bitRows * kStrip];
    for (int64_t i = panels.row(begin) * kStrip; i < panels.row(end) * kStrip; ++i) total[i] = 0.0f;
    const uint8_t* strip = a.packed + item * s.strip_bytes;
    for (int64_t g = 0; g < s.groups; g += step) {
      const int64_t stop = g + step < s.groups ? g + step : s.groups;
      Prefetch prefetch = s.prefetch(strip, g, stop, end - begin);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t row = panels.row(p);
        const uint32_t* pairs = scratch + row * s.padded_k / 2 + g * s.padded_group / 2 * panels.size(p);
        panel(panels.size(p), decoder, Piece{s, strip, g, stop, pairs}, prefetch, total + row * kStrip);
      }
    }
    const int64_t row = panels.row(begin);
    write_out<BF16, kStrip>(a, total + row * kStrip, item * kStrip, first + row,
                            static_cast<int>(panels.row(end) - row));
  });
}

bool all_bf16(const float* codebook) {  // and none that the instruction takes for 0
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = float_to_bits(codebook[i]), magnitude = bits & 0x7fffffffu;
    if ((bits & 0xffffu) != 0 || (magnitude != 0 && magnitude < 0x00800000u)) return false;
  }
  return true;
}

}  // namespace

void linear_4bit(const Linear4bitArgs& a) {
  if (a.dtype != kBFloat16 || (a.code == kCodebook4 && !all_bf16(a.codebook))) return avx512::linear_4bit(a);
  alignas(64) uint32_t small[kSmallScratch];
  uint32_t* scratch = a.scratch ? reinterpret_cast<uint32_t*>(a.scratch) : small;
  const Int4R16 s(a);
  for (int64_t first = 0; first < a.rows; first += kLinear4bitRows) {
    const int64_t left = a.rows - first, rows = left < kLinear4bitRows ? left : kLinear4bitRows;
    a.code == kUint4 ? run<Differences>(a, s, scratch, first, rows) : run<Values>(a, s, scratch, first, rows);
  }
}

}  // namespace pykd::PYKD_LEVEL
