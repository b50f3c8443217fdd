// Layer normalisation (Ba et al. 2016) of a sum: y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, s = x +
// residual, for rows of float32. The sum is formed once and stays in the first-level cache for the variance and the
// result.
#include <cmath>

#include "cpu/linear_rows.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {
namespace {

constexpr int kSums = 4;  // sums in lock step: one addition would wait for the one before it

// fn(index, elements, sum): four whole vectors at a time, then one by one, then what is left (elements < kWidth).
template <class Fn>
PYKD_INLINE void for_vectors(int64_t size, const Fn& fn) {
  int64_t k = 0;
  for (; k + kSums * kWidth <= size; k += kSums * kWidth)
    for (int i = 0; i < kSums; ++i) fn(k + i * kWidth, int64_t{kWidth}, i);
  for (; k + kWidth <= size; k += kWidth) fn(k, int64_t{kWidth}, 0);
  if (k < size) fn(k, size - k, 0);
}

PYKD_INLINE F32 read(const float* p, int64_t n, float fill) { return n == kWidth ? load(p) : load_n(p, n, fill); }
PYKD_INLINE void write(float* p, F32 x, int64_t n) { n == kWidth ? store(p, x) : store_n(p, x, n); }
PYKD_INLINE float total(const F32 (&sums)[kSums]) {
  return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

void normalise(const AddNormArgs& a, int64_t row) {
  const float* x = a.x + row * a.size;
  const float* residual = a.residual + row * a.size;
  float* y = a.y + row * a.size;
  F32 sums[kSums] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  for_vectors(a.size, [&](int64_t k, int64_t n, int i) {
    const F32 sum = add(read(x + k, n, 0.0f), read(residual + k, n, 0.0f));
    write(y + k, sum, n);
    sums[i] = add(sums[i], sum);
  });
  const float mean = total(sums) / static_cast<float>(a.size);
  const F32 middle = set1(mean);
  F32 squares[kSums] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  for_vectors(a.size, [&](int64_t k, int64_t n, int i) {
    const F32 off = sub(read(y + k, n, mean), middle);
    squares[i] = fma(off, off, squares[i]);
  });
  const float variance = total(squares) / static_cast<float>(a.size);
  const F32 factor = set1(1.0f / std::sqrt(variance + a.eps));
  for_vectors(a.size, [&](int64_t k, int64_t n, int) {
    const F32 scaled = mul(sub(read(y + k, n, mean), middle), factor);
    write(y + k, fma(scaled, read(a.weight + k, n, 0.0f), read(a.bias + k, n, 0.0f)), n);
  });
}

}  // namespace

void add_norm(const AddNormArgs& a) {
  parallel_for(a.rows, grain(8 * a.size), a.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) normalise(a, row);
  });
}

}  // namespace pykd::PYKD_LEVEL
