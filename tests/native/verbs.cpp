#include "verbs.h"

#include "cpu/activation.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"

namespace pykd::PYKD_LEVEL {
namespace {

// y = verb(x): whole vectors, then the tail through load_n and store_n.
template <class In, class Out, class Verb>
void map(const In* x, int64_t count, Out* y, const Verb& verb) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(y + i, verb(load(x + i)));
  if (i < count) store_n(y + i, verb(load_n(x + i, count - i, 1.0f)), count - i);
}

// The middle one of several in lock step.
F32 log_quotient_of(F32 x, F32 y) {
  const F32 above[3] = {set1(2.0f), x, set1(0.5f)}, below[3] = {set1(3.0f), y, set1(5.0f)};
  F32 out[3];
  log_quotient(above, below, out);
  return out[1];
}

F32 exp_of(F32 x, const ScaledExp& constant) {
  const ScaledExp other = scaled_exp(0.1);
  const F32 several[3] = {set1(-1.0f), x, set1(-2.0f)};
  const ScaledExp* const constants[3] = {&other, &constant, &other};
  F32 y[3];
  exp(several, constants, y);
  return y[1];
}

void unary(Unary verb, const float* x, int64_t count, float* y) {
  switch (verb) {
    case Unary::kCopy:
      return map(x, count, y, [](F32 v) { return v; });
    case Unary::kExp:
      return map(x, count, y, [](F32 v) { return exp(v); });
    case Unary::kRoundEven:
      return map(x, count, y, [](F32 v) { return round_even(v); });
    case Unary::kGelu:
      return map(x, count, y, [](F32 v) { return activate(v, kGelu); });
    case Unary::kGeluTanh:
      return map(x, count, y, [](F32 v) { return activate(v, kGeluTanh); });
    case Unary::kSilu:
      return map(x, count, y, [](F32 v) { return activate(v, kSilu); });
    case Unary::kRelu:
      return map(x, count, y, [](F32 v) { return activate(v, kRelu); });
  }
}

F32 apply(Binary verb, F32 a, F32 b) {
  switch (verb) {
    case Binary::kAdd:
      return add(a, b);
    case Binary::kSub:
      return sub(a, b);
    case Binary::kMul:
      return mul(a, b);
    case Binary::kDiv:
      return div(a, b);
    case Binary::kFma:
      return fma(a, b, a);
    case Binary::kFnma:
      return fnma(a, b, a);
    case Binary::kMin:
      return min(a, b);
    case Binary::kMax:
      return max(a, b);
    case Binary::kSelectLess:
      return select(less(a, b), a, set1(7.0f));
    case Binary::kSelectEqual:
      return select(equal(a, b), a, set1(7.0f));
    case Binary::kScaleByPower:
      return scale_by_power(a, b);
    case Binary::kLogQuotient:
      return log_quotient_of(a, b);
  }
  return a;
}

void binary(Binary verb, const float* a, const float* b, int64_t count, float* y) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(y + i, apply(verb, load(a + i), load(b + i)));
  const int64_t left = count - i;
  if (left > 0) store_n(y + i, apply(verb, load_n(a + i, left, 1.0f), load_n(b + i, left, 1.0f)), left);
}

void scaled_exp_of(double scale, const float* x, int64_t count, float* y) {
  const ScaledExp constant = scaled_exp(scale);
  map(x, count, y, [&](F32 v) { return exp_of(v, constant); });
}

void widen(int dtype, const uint16_t* x, int64_t count, float* y) {
  const auto copy = [](F32 v) { return v; };
  if (dtype == kBFloat16)
    map(reinterpret_cast<const BF16*>(x), count, y, copy);
  else
    map(reinterpret_cast<const F16*>(x), count, y, copy);
}

void narrow(int dtype, const float* x, int64_t count, uint16_t* y) {
  const auto copy = [](F32 v) { return v; };
  if (dtype == kBFloat16)
    map(x, count, reinterpret_cast<BF16*>(y), copy);
  else
    map(x, count, reinterpret_cast<F16*>(y), copy);
}

float sum_of(const float* x) { return reduce_add(load(x)); }
float max_of(const float* x) { return reduce_max(load(x)); }

void transpose_of(const float* x, float* y) {
  F32 block[kWidth];
  for (int i = 0; i < kWidth; ++i) block[i] = load(x + i * kWidth);
  transpose(block);
  for (int i = 0; i < kWidth; ++i) store(y + i * kWidth, block[i]);
}

}  // namespace

Verbs verbs() { return {kWidth, unary, binary, scaled_exp_of, widen, narrow, sum_of, max_of, transpose_of}; }

}  // namespace pykd::PYKD_LEVEL
