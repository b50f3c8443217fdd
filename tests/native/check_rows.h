// What the checks of the distillation losses share: softmax and cross entropy written out in double precision, and
// rows of logits.
#pragma once

#include <cmath>

#include "check.h"

namespace check {

using Row = std::vector<double>;

constexpr double kEpsilon = 4e-6;  // of float32 exponentials and their sums, relative to what is added up

struct Truth {
  double loss = 0, loss_size = 0;  // size: sum of the magnitudes that rounding acts on
  Row gradient, size;
};

inline Row log_softmax(const Row& x, double a) {
  double top = -HUGE_VAL, sum = 0;
  for (const double v : x) top = std::max(top, v);
  if (std::isinf(top)) return {};
  for (const double v : x) sum += std::exp(a * (v - top));
  Row result;
  for (const double v : x) result.push_back(a * (v - top) - std::log(sum));
  return result;
}

inline double product(double p, double x) { return p == 0 ? 0 : p * x; }

template <class Args>
void add_cross_entropy(const Args& args, const Row& student, int64_t label, double scale, Truth* truth) {
  const double w = scale * args.ce_weight, smooth = args.label_smoothing;
  if (!args.labels || args.ce_weight == 0) return;
  const size_t classes = student.size();
  const Row lp = log_softmax(student, 1);
  double loss = -(1 - smooth) * lp[static_cast<size_t>(label)];
  for (size_t i = 0; i < classes && smooth != 0; ++i) loss -= smooth * lp[i] / static_cast<double>(classes);
  truth->loss += w * loss;
  truth->loss_size += std::fabs(w) * (loss + 1);
  for (size_t i = 0; i < truth->gradient.size(); ++i) {
    const double target = (static_cast<int64_t>(i) == label ? 1 - smooth : 0) + smooth / static_cast<double>(classes);
    truth->gradient[i] += w * (std::exp(lp[i]) - target);
    truth->size[i] += std::fabs(w) * (std::exp(lp[i]) + target);
  }
}

// Fills row r of a matrix of logits; some rows have -inf among them, a few nothing else.
inline void fill_row(Random& random, const Buffer& buffer, int64_t begin, int64_t classes, int dtype, bool finite) {
  const double spread = random.pick<double>({0.1, 3, 3, 30, 1e4});
  const double hole = finite ? 0 : random.pick<double>({0, 0, 0.1, 1});
  for (int64_t i = 0; i < classes; ++i)
    encode(buffer.data(), begin + i, dtype, random.chance(hole) ? -HUGE_VAL : spread * random.normal());
}

inline Row read_row(const Buffer& buffer, int64_t begin, int64_t classes, int64_t padded, int dtype) {
  Row row(static_cast<size_t>(padded), -HUGE_VAL);
  for (int64_t i = 0; i < classes; ++i) row[static_cast<size_t>(i)] = decode(buffer.data(), begin + i, dtype);
  return row;
}

}  // namespace check
