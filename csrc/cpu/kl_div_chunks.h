// The inner loops of kl_div: everything that touches every class. kl_div.cpp explains the schedule.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {

// Classes handled between two looks at the running maximum: student and teacher chunk together fill half of L1.
constexpr int64_t kChunk = 2048;

PYKD_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Brings `count` classes into float32 and finds their maximum. `available` of them exist at `source`, the others are
// -inf (narrower vocabulary). The result is `source` itself where that needs no change, else `buffer`, filled up to a
// whole vector with -FLT_MAX: a finite number, so that lanes that are no class never meet the rules for -inf.
template <class T>
inline const float* stage_chunk(const T* source, int64_t available, int64_t count, float* buffer, float* maximum) {
  const bool direct = std::is_same<T, float>::value && available >= count && count % kWidth == 0;
  if (available > count) available = count;
  if (available < 0) available = 0;
  const int64_t whole = available / kWidth * kWidth;
  F32 first = set1(-INFINITY), second = first;
  for (int64_t i = 0; i < whole; i += kWidth) {
    const F32 x = load(source + i);
    if (!direct) store(buffer + i, x);
    if (i / kWidth % 2 == 0)
      first = max(first, x);
    else
      second = max(second, x);
  }
  if (whole < available) {
    const F32 x = load_n(source + whole, available - whole, -INFINITY);
    store(buffer + whole, x);  // the buffer has room for a whole vector more
    second = max(second, x);
  }
  *maximum = reduce_max(max(first, second));
  if (direct) return reinterpret_cast<const float*>(source);
  for (int64_t i = available; i < count; ++i) buffer[i] = -INFINITY;
  for (int64_t i = count; i < round_up(count, kWidth); ++i) buffer[i] = -FLT_MAX;
  return buffer;
}

struct ChunkSums {
  float student, teacher, label;  // sums of e^((s - s_reference) / T), e^((t - t_reference) / T), e^(s - s_reference)
  float cross;                    // forward: sum e_t * (dt - ds); reverse: sum e_s * (ds - dt); d = x - reference
  bool infinite;                  // careful only: a class has mass on one side and -inf on the other
};

// Where one chunk's exponentials are kept for the second sweep.
struct ChunkScratch {
  float* student;  // e_s
  float* other;    // forward, jsd, tv: e_t; reverse: e_s * (ds - dt)
  float* label;    // e^(s - s_reference), if kept
};

// e * (from - to), with the rules for -inf: nothing where `from` is -inf, infinite where only `to` is.
PYKD_INLINE F32 careful_product(F32 e, F32 from, F32 to, F32* infinite) {
  const F32 lowest = set1(-INFINITY), zero = set1(0.0f);
  const F32 hit = select(equal(from, lowest), zero, select(equal(to, lowest), set1(1.0f), zero));
  *infinite = max(*infinite, hit);
  return select(equal(from, lowest), zero, select(equal(to, lowest), zero, mul(e, sub(from, to))));
}

// Exponentials of one chunk. Without kCareful a -inf logit can leave NaN or infinity in `cross`; the caller then runs
// the chunk, which is still in L1, once more with kCareful.
template <int kDirection, bool kLabel, bool kCareful>
inline ChunkSums exponentials(const float* student, const float* teacher, int64_t padded, float student_reference,
                              float teacher_reference, const ScaledExp& soft, const ScaledExp& hard,
                              const ChunkScratch& scratch) {
  const F32 s0 = set1(student_reference), t0 = set1(teacher_reference), zero = set1(0.0f);
  F32 student_sum = zero, teacher_sum = zero, label_sum = zero, cross = zero, infinite = zero;
  for (int64_t i = 0; i < padded; i += kWidth) {
    const F32 ds = sub(load(student + i), s0), dt = sub(load(teacher + i), t0);
    const F32 es = exp(ds, soft), et = exp(dt, soft);
    student_sum = add(student_sum, es);
    teacher_sum = add(teacher_sum, et);
    store(scratch.student + i, es);
    F32 other = et;
    if (kDirection == kReverse) {
      other = kCareful ? careful_product(es, ds, dt, &infinite) : mul(es, sub(ds, dt));
      cross = add(cross, other);
    } else if (kDirection == kForward) {
      cross = kCareful ? add(cross, careful_product(et, dt, ds, &infinite)) : fma(et, sub(dt, ds), cross);
    }
    store(scratch.other + i, other);
    if (kLabel) {
      const F32 e1 = exp(ds, hard);
      label_sum = add(label_sum, e1);
      store(scratch.label + i, e1);
    }
  }
  return {reduce_add(student_sum), reduce_add(teacher_sum), reduce_add(label_sum), reduce_add(cross),
          kCareful && reduce_max(infinite) > 0.0f};
}

// Sum of x - reference over the first `count` classes of a chunk (label smoothing).
inline float sum_of_differences(const float* x, int64_t count, float reference) {
  const F32 shift = set1(reference);
  F32 sum = set1(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) sum = add(sum, sub(load(x + i), shift));
  float total = reduce_add(sum);
  for (; i < count; ++i) total += x[i] - reference;
  return total;
}

struct MixtureSums {
  float loss;   // jsd: sum beta Q log(Q / M) + (1 - beta) P log(P / M); tv: sum |P - Q| / 2
  float slope;  // sum of P * g, where g is the derivative by P
};

// jsd and tv of one chunk of normalised probabilities P = student * e_s, Q = teacher * e_t, with M = beta Q +
// (1 - beta) P. Overwrites e_t by P * g: g = log(P / M) for jsd, sign(P - Q) / 2 for tv.
template <int kDirection>
inline MixtureSums mixture(const ChunkScratch& scratch, int64_t padded, float student, float teacher, float beta) {
  const F32 ks = set1(student), kt = set1(teacher), of_teacher = set1(beta), of_student = set1(1.0f - beta);
  const F32 zero = set1(0.0f), half = set1(0.5f), tiny = set1(FLT_MIN);
  F32 loss = zero, slope = zero;
  for (int64_t i = 0; i < padded; i += kWidth) {
    const F32 p = mul(load(scratch.student + i), ks), q = mul(load(scratch.other + i), kt);
    F32 p_slope;
    if (kDirection == kJsd) {
      const F32 inverse = div(set1(1.0f), max(tiny, fma(of_teacher, q, mul(of_student, p))));
      p_slope = mul(p, log(max(tiny, mul(p, inverse))));
      const F32 q_term = mul(q, log(max(tiny, mul(q, inverse))));
      loss = fma(of_teacher, q_term, fma(of_student, p_slope, loss));
    } else {
      const F32 sign = select(less(q, p), half, select(less(p, q), set1(-0.5f), zero));
      p_slope = mul(p, sign);
      loss = fma(sign, sub(p, q), loss);
    }
    slope = add(slope, p_slope);
    store(scratch.other + i, p_slope);
  }
  return {reduce_add(loss), reduce_add(slope)};
}

// The gradient of every direction is linear in what the scratch holds.
struct GradientFactors {
  float student, other, label, constant;
};

template <class T, bool kLabel>
inline void write_gradient(T* gradient, int64_t count, const ChunkScratch& scratch, const GradientFactors& factors) {
  const F32 student = set1(factors.student), other = set1(factors.other), label = set1(factors.label);
  const F32 constant = set1(factors.constant);
  const auto at = [&](int64_t i) {
    const F32 rest = kLabel ? fma(load(scratch.label + i), label, constant) : constant;
    return fma(load(scratch.student + i), student, fma(load(scratch.other + i), other, rest));
  };
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(gradient + i, at(i));
  if (i < count) store_n(gradient + i, at(i), count - i);
}

}  // namespace pykd::PYKD_LEVEL
