// Activation functions of float32 vectors, for the end of a linear layer.
#pragma once

#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {

PYKD_INLINE F32 magnitude(F32 x) { return max(x, sub(set1(0.0f), x)); }

// x / (1 + e^-z), from e^-|z|, which cannot overflow: to 4 ulp for an exact z.
PYKD_INLINE F32 times_sigmoid(F32 x, F32 z) {
  const F32 one = set1(1.0f), e = exp(sub(set1(0.0f), magnitude(z)));
  return mul(x, div(select(less(z, set1(0.0f)), e, one), add(one, e)));
}

// x * Phi(x), Phi being the distribution function of the normal distribution, to 8 ulp, in the lower tail too, where
// 1 + erf would cancel: for t = |x|, Phi(-t) = e^(-t^2 / 2) q(u) / (t + 3) with u = (t - 3) / (t + 3) and q a minimax
// polynomial, relative error 1e-9 up to t = 14.5 (beyond, the exponential is 0). t^2 is summed from two parts, so that
// the exponential does not magnify its rounding: high, which has at most 10 bits, squared, and a small rest.
PYKD_INLINE F32 gelu(F32 x) {
  constexpr float kPolynomial[] = {5.445443221e-05f, 1.312521744e-04f,  -2.447556558e-04f, -1.032523324e-03f,
                                   1.024784905e-03f, 6.969302257e-03f,  -1.046252054e-02f, -4.726268762e-02f,
                                   2.300177000e-01f, -5.093319914e-01f, 7.290836904e-01f};
  const F32 t = min(set1(16.0f), magnitude(x));  // NaN: min returns its second argument
  const F32 inverse = div(set1(1.0f), add(t, set1(3.0f)));
  const F32 u = mul(sub(t, set1(3.0f)), inverse);
  F32 q = set1(kPolynomial[0]);
  for (int k = 1; k < 11; ++k) q = fma(q, u, set1(kPolynomial[k]));
  const F32 high = mul(round_even(mul(t, set1(64.0f))), set1(0.015625f));
  const F32 half = set1(-0.5f), rest = mul(sub(t, high), add(t, high));
  const F32 tail = mul(mul(q, inverse), exp(mul(mul(high, high), half), mul(rest, half)));
  return mul(x, select(less(x, set1(0.0f)), tail, sub(set1(1.0f), tail)));
}

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as x / (1 + e^-z) for z = twice the argument of tanh.
PYKD_INLINE F32 gelu_tanh(F32 x) {
  const F32 z = mul(x, fma(mul(x, x), set1(0.0713548162726f), set1(1.59576912161f)));
  return times_sigmoid(x, z);
}

PYKD_INLINE F32 activate(F32 x, int activation) {
  switch (activation) {
    case kGelu:
      return gelu(x);
    case kGeluTanh:
      return gelu_tanh(x);
    case kSilu:
      return times_sigmoid(x, x);
    case kRelu:
      return max(set1(0.0f), x);  // NaN stays
    default:
      return x;
  }
}

}  // namespace pykd::PYKD_LEVEL
