// Bidirectional attention of short texts: y = softmax(scale q k^T + bias) v for every text and head, in float32.
//
// Keys of a head are transposed once ([dim][keys], keys in whole vectors) and values copied beside each other, so that
// both products are the same register tile: rows of queries x vectors of keys, then x vectors of a head. Between them
// the scores of a panel of queries, kPanel x keys floats, stay in the first-level cache. Nothing is kept of the others:
// for 128 keys of 64 a head's memory is 72 KB, and a product of 128 x 128 x 64 is too small for a library's packing.
#include <cmath>

#include "cpu/linear_rows.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {
namespace {

#if defined(PYKD_LEVEL_avx512)
constexpr int kPanel = 6, kTile = 4;  // 6 x 4 accumulators, 4 vectors of keys, a query: 29 of 32 registers
#elif defined(PYKD_LEVEL_avx2)
constexpr int kPanel = 6, kTile = 2;  // 6 x 2 accumulators, 2 vectors of keys, a query: 15 of 16 registers
#else
constexpr int kPanel = 4, kTile = 2;
#endif

int64_t whole_vectors(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

// What a thread keeps of a head, and the scores of a panel.
struct Head {
  int64_t keys, width;              // length and dim in whole vectors
  float *transposed, *values;       // [dim][keys], [length][width]
  float *bias, *scores, *products;  // [keys], [kPanel][keys], [kPanel][width]

  Head(const AttentionArgs& a, int thread)
      : keys(whole_vectors(a.length)),
        width(whole_vectors(a.dim)),
        transposed(a.scratch + thread * attention_scratch(a.length, a.dim)),
        values(transposed + a.dim * keys),
        bias(values + a.length * width),
        scores(bias + keys),
        products(scores + kPanel * keys) {}
};

// --- packing --------------------------------------------------------------------------------------------------------

// to[d][key] = k[key][d], 0 for the keys that fill up the last vector.
void transpose_keys(const float* k, int64_t stride, int64_t length, int64_t dim, int64_t keys, float* to) {
  for (int64_t first = 0; first < keys; first += kWidth) {
    const int64_t rows = length - first < kWidth ? length - first : kWidth;
    for (int64_t d = 0; d < dim; d += kWidth) {
      const int64_t columns = dim - d < kWidth ? dim - d : kWidth;
      F32 block[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        const float* row = k + (first + i) * stride + d;
        block[i] = i >= rows ? set1(0.0f) : columns == kWidth ? load(row) : load_n(row, columns, 0.0f);
      }
      transpose(block);
      for (int64_t i = 0; i < columns; ++i) store(to + (d + i) * keys + first, block[i]);
    }
  }
}

void copy_values(const float* v, int64_t stride, int64_t length, int64_t dim, int64_t width, float* to) {
  for (int64_t key = 0; key < length; ++key, v += stride, to += width)
    for (int64_t d = 0; d < width; d += kWidth)
      store(to + d, d + kWidth <= dim ? load(v + d) : load_n(v + d, dim - d, 0.0f));
}

void pack(const AttentionArgs& a, int64_t text, int64_t head, const Head& h) {
  const int64_t first = text * a.length;
  transpose_keys(a.k + first * a.k_stride + head * a.dim, a.k_stride, a.length, a.dim, h.keys, h.transposed);
  copy_values(a.v + first * a.v_stride + head * a.dim, a.v_stride, a.length, a.dim, h.width, h.values);
  for (int64_t key = 0; key < h.keys; ++key)
    h.bias[key] = key >= a.length ? -INFINITY : a.bias ? a.bias[first + key] : 0.0f;
}

// --- the register tile ----------------------------------------------------------------------------------------------

// to[m][NV vectors] = sum over k of a[m][k] * b[k][NV vectors], for MR rows.
template <int NV, int MR>
void tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, float* to,
          int64_t to_stride) {
  F32 sum[MR][NV];
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < NV; ++i) sum[m][i] = set1(0.0f);
  for (int64_t k = 0; k < count; ++k, b += b_stride) {
    F32 column[NV];
    for (int i = 0; i < NV; ++i) column[i] = load(b + i * kWidth);
    for (int m = 0; m < MR; ++m) {
      const F32 value = set1(a[m * a_stride + k]);
      for (int i = 0; i < NV; ++i) sum[m][i] = fma(column[i], value, sum[m][i]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < NV; ++i) store(to + m * to_stride + i * kWidth, sum[m][i]);
}

template <int MR, int NV = kTile>
void tile_columns(int64_t vectors, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count,
                  float* to, int64_t to_stride) {
  if constexpr (NV > 1) {
    if (vectors < NV) return tile_columns<MR, NV - 1>(vectors, a, a_stride, b, b_stride, count, to, to_stride);
  }
  tile<NV, MR>(a, a_stride, b, b_stride, count, to, to_stride);
}

// to[rows][columns] = a[rows][count] b[count][columns]; columns in whole vectors.
template <int MR = kPanel>
void product(int rows, int64_t columns, const float* a, int64_t a_stride, const float* b, int64_t count, float* to) {
  if constexpr (MR > 1) {
    if (rows < MR) return product<MR - 1>(rows, columns, a, a_stride, b, count, to);
  }
  for (int64_t at = 0; at < columns; at += kTile * kWidth)
    tile_columns<MR>((columns - at) / kWidth, a, a_stride, b + at, columns, count, to + at, columns);
}

// --- a panel of queries ---------------------------------------------------------------------------------------------

// scores = e^(scale * scores + bias - their maximum); returned is their sum. A query that may look at nothing, all
// scores -inf, has zeros.
float exponentials(float* scores, const Head& h, float scale) {
  F32 most = set1(-INFINITY);
  for (int64_t key = 0; key < h.keys; key += kWidth) {
    const F32 score = fma(load(scores + key), set1(scale), load(h.bias + key));
    store(scores + key, score);
    most = max(score, most);
  }
  const float largest = reduce_max(most);
  const F32 shift = set1(largest > -INFINITY ? largest : 0.0f);
  F32 sum = set1(0.0f);
  for (int64_t key = 0; key < h.keys; key += kWidth) {
    const F32 value = exp(sub(load(scores + key), shift));
    store(scores + key, value);
    sum = add(sum, value);
  }
  return reduce_add(sum);
}

void attend(const AttentionArgs& a, int64_t text, int64_t head, int64_t query, int rows, const Head& h) {
  const int64_t first = text * a.length + query, width = a.heads * a.dim;
  product(rows, h.keys, a.q + first * a.q_stride + head * a.dim, a.q_stride, h.transposed, a.dim, h.scores);
  float sums[kPanel];
  for (int m = 0; m < rows; ++m) sums[m] = exponentials(h.scores + m * h.keys, h, a.scale);
  product(rows, h.width, h.scores, h.keys, h.values, a.length, h.products);
  for (int m = 0; m < rows; ++m) {
    const F32 inverse = set1(sums[m] == 0.0f ? 0.0f : 1.0f / sums[m]);
    const float* from = h.products + m * h.width;
    float* y = a.y + (first + m) * width + head * a.dim;
    int64_t d = 0;
    for (; d + kWidth <= a.dim; d += kWidth) store(y + d, mul(load(from + d), inverse));
    if (d < a.dim) store_n(y + d, mul(load(from + d), inverse), a.dim - d);
  }
}

}  // namespace

void attention(const AttentionArgs& a) {
  const int64_t panels = (a.length + kPanel - 1) / kPanel;
  parallel_for(a.batch * a.heads * panels, grain(2 * kPanel * a.length * a.dim), a.threads,
               [&](int64_t begin, int64_t end, int thread) {
                 const Head h(a, thread);
                 int64_t packed = -1;
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t which = item / panels, query = item % panels * kPanel;
                   if (which != packed) pack(a, which / a.heads, which % a.heads, h);
                   packed = which;
                   const int64_t left = a.length - query;
                   attend(a, which / a.heads, which % a.heads, query, static_cast<int>(left < kPanel ? left : kPanel),
                          h);
                 }
               });
}

}  // namespace pykd::PYKD_LEVEL
