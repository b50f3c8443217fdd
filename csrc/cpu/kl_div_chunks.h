// The inner loops of kl_div: everything that touches every class. kl_div.cpp explains the schedule.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {

// Classes handled between two looks at the running maximum: each lane adds 256 terms in float32 before the sum goes
// on in float64, and the student's and the teacher's chunk together fill half of L1.
constexpr int64_t kChunk = 256 * kWidth;

PYKD_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Brings `count` classes into float32 and finds their maximum. `available` of them exist at `source`, the others are
// -inf (narrower vocabulary). The result is `source` itself where that needs no change, else `buffer`.
template <class T>
inline const float* stage_chunk(const T* source, int64_t available, int64_t count, float* buffer, float* maximum) {
  const bool direct = std::is_same<T, float>::value && available >= count;
  if (available > count) available = count;
  if (available < 0) available = 0;
  constexpr int kVectors = 4;
  F32 best[kVectors] = {set1(-INFINITY), set1(-INFINITY), set1(-INFINITY), set1(-INFINITY)};
  int64_t i = 0;
  for (; i + kVectors * kWidth <= available; i += kVectors * kWidth)
    for (int v = 0; v < kVectors; ++v) {
      const F32 x = load(source + i + v * kWidth);
      if (!direct) store(buffer + i + v * kWidth, x);
      best[v] = max(best[v], x);
    }
  for (; i < available; i += kWidth) {
    const F32 x = available - i >= kWidth ? load(source + i) : load_n(source + i, available - i, -INFINITY);
    if (!direct) store(buffer + i, x);  // the buffer has room for a whole vector more
    best[0] = max(best[0], x);
  }
  *maximum = reduce_max(max(max(best[0], best[1]), max(best[2], best[3])));
  if (direct) return reinterpret_cast<const float*>(source);
  for (i = available; i < count; ++i) buffer[i] = -INFINITY;
  return buffer;
}

// How e^(s - s_reference), the label term's exponential, comes about: not at all (or T = 1, where it is e_s), as an
// exponential of its own, or, for T = 2 and T = 4, as a power of e_s, which saves an exponential and a scratch row.
enum LabelExp { kNone = 0, kOwn = 1, kSquare = 2, kFourth = 4 };

template <int kLabel>
PYKD_INLINE F32 label_power(F32 es) {
  const F32 square = mul(es, es);
  return kLabel == kFourth ? mul(square, square) : square;
}

struct ChunkSums {
  float student, teacher, label;  // sums of e^((s - s_reference) / T), e^((t - t_reference) / T), e^(s - s_reference)
  float cross;                    // forward: sum e_t * (dt - ds); reverse: sum e_s * (ds - dt); d = x - reference
  bool infinite;                  // careful only: a class has mass on one side and -inf on the other
};

// Where one chunk's exponentials are kept for the second sweep.
struct ChunkScratch {
  float* student;          // e_s
  float* other;            // forward, jsd, tv: e_t; reverse: e_s * (ds - dt)
  float* label;            // e^(s - s_reference), if kept
  float* ratio = nullptr;  // jsd: ds - dt, the logarithm of the probabilities' ratio but for a factor and a constant
};

// e * (from - to), with the rules for -inf: nothing where `from` is -inf, infinite where only `to` is.
PYKD_INLINE F32 careful_product(F32 e, F32 from, F32 to, F32* infinite) {
  const F32 lowest = set1(-INFINITY), zero = set1(0.0f);
  const F32 hit = select(equal(from, lowest), zero, select(equal(to, lowest), set1(1.0f), zero));
  *infinite = max(*infinite, hit);
  return select(equal(from, lowest), zero, select(equal(to, lowest), zero, mul(e, sub(from, to))));
}

// Vectors of classes in lock step, with two or three exponentials each. An exponential holds three registers: six of
// them at a time do not fit into 16 registers, and three exponentials a class then cost a third more.
#if defined(PYKD_LEVEL_avx2)
template <int kLabel>
constexpr int kVectorsAtATime = kLabel == kOwn ? 1 : 2;
#else
template <int kLabel>
constexpr int kVectorsAtATime = 2;
#endif

// The logits one chunk ahead (or of the next row), fetched while this chunk's exponentials keep the core busy: else
// memory would idle then, and the core while the next maximum is searched. A prefetch never faults.
struct Ahead {
  const char *student, *teacher;
  int student_bytes, teacher_bytes;  // per class

  template <int kVectors>
  PYKD_INLINE void fetch(int64_t at) const {
    constexpr int64_t kLine = 16;  // classes of float32; half as many lines would do for bf16
    for (int64_t i = at; i < at + kVectors * kWidth; i += kLine) {
      __builtin_prefetch(student + i * student_bytes);
      __builtin_prefetch(teacher + i * teacher_bytes);
    }
  }
};

// Exponentials of one chunk. Without kCareful a -inf logit can leave NaN or infinity in `cross`; the caller then runs
// the chunk, which is still in L1, once more with kCareful.
template <int kDirection, int kLabel, bool kCareful>
struct Exponentials {
  const float *student, *teacher;
  F32 student_reference, teacher_reference;
  const ScaledExp &soft, &hard;
  ChunkScratch scratch;
  Ahead ahead;
  F32 student_sum = set1(0.0f), teacher_sum = set1(0.0f), label_sum = set1(0.0f), cross = set1(0.0f);
  F32 infinite = set1(0.0f);

  // `read(x)` is the logits of a vector at x.
  template <int kVectors, class Read>
  PYKD_INLINE void step(int64_t at, const Read& read) {
    constexpr int kEach = kLabel == kOwn ? 3 : 2;  // exponentials per class
    F32 x[kEach * kVectors], e[kEach * kVectors];
    const ScaledExp* constants[kEach * kVectors];
    for (int v = 0; v < kVectors; ++v) {
      x[kEach * v] = sub(read(student + at + v * kWidth), student_reference);
      x[kEach * v + 1] = sub(read(teacher + at + v * kWidth), teacher_reference);
      constants[kEach * v] = constants[kEach * v + 1] = &soft;
      if (kLabel == kOwn) {
        x[kEach * v + kEach - 1] = x[kEach * v];
        constants[kEach * v + kEach - 1] = &hard;
      }
    }
    ahead.fetch<kVectors>(at);
    exp(x, constants, e);
    for (int v = 0; v < kVectors; ++v)
      gather(at + v * kWidth, x[kEach * v], x[kEach * v + 1], e[kEach * v], e[kEach * v + 1], e[kEach * v + kEach - 1]);
  }

  PYKD_INLINE void gather(int64_t at, F32 ds, F32 dt, F32 es, F32 et, F32 e1) {
    student_sum = add(student_sum, es);
    teacher_sum = add(teacher_sum, et);
    store(scratch.student + at, es);
    F32 other = et;
    if (kDirection == kReverse) {
      other = kCareful ? careful_product(es, ds, dt, &infinite) : mul(es, sub(ds, dt));
      cross = add(cross, other);
    } else if (kDirection == kForward) {
      cross = kCareful ? add(cross, careful_product(et, dt, ds, &infinite)) : fma(et, sub(dt, ds), cross);
    }
    store(scratch.other + at, other);
    if (kDirection == kJsd) store(scratch.ratio + at, sub(ds, dt));
    if (kLabel == kOwn) {
      label_sum = add(label_sum, e1);
      store(scratch.label + at, e1);
    } else if (kLabel != kNone) {
      label_sum = add(label_sum, label_power<kLabel>(es));
    }
  }

  // Lanes behind the last class hold -FLT_MAX: a finite number, so that they never meet the rules for -inf.
  PYKD_INLINE ChunkSums run(int64_t count) {
    int64_t at = 0;
    constexpr int kVectors = kVectorsAtATime<kLabel>;
    const auto whole = [](const float* x) { return load(x); };
    for (; at + kVectors * kWidth <= count; at += kVectors * kWidth) step<kVectors>(at, whole);
    for (; at + kWidth <= count; at += kWidth) step<1>(at, whole);
    if (at < count) step<1>(at, [&](const float* x) { return load_n(x, count - at, -FLT_MAX); });
    return {reduce_add(student_sum), reduce_add(teacher_sum), reduce_add(label_sum), reduce_add(cross),
            kCareful && reduce_max(infinite) > 0.0f};
  }
};

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
  float teacher;  // jsd: sum e_t log(Q / M); tv: sum |P - Q| / 2
  float student;  // sum of P * g, where g is the derivative by P: jsd: sum P log(P / M)
};

// What a chunk of the mixture needs: P = student * e_s, Q = teacher * e_t, M = mixed_student * e_s + mixed_teacher *
// e_t, log(P / Q) = a * (ds - dt) + shift.
struct MixtureFactors {
  F32 student, teacher, mixed_student, mixed_teacher, shift;
  F32 a, a_low, highest;  // a in two parts, since its error would not average out; -log(beta)
};

// jsd and tv of one chunk. Overwrites e_t by P * g: g = log(P / M) for jsd, sign(P - Q) / 2 for tv. One logarithm
// serves jsd, because log(Q / M) = log(P / M) - log(P / Q); it is at most -log(beta), which also replaces the infinity
// or NaN that comes of P = 0.
template <int kDirection>
struct Mixture {
  ChunkScratch scratch;
  const MixtureFactors& factors;
  F32 teacher_sum = set1(0.0f), student_sum = set1(0.0f);

  template <int kVectors>
  PYKD_INLINE void step(int64_t at) {
    const F32 tiny = set1(0x1p-125f);  // the least that log_quotient takes
    F32 es[kVectors], et[kVectors], p[kVectors], slope[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      es[v] = load(scratch.student + at + v * kWidth);
      et[v] = load(scratch.other + at + v * kWidth);
      p[v] = mul(es[v], factors.student);
    }
    if (kDirection == kJsd) {
      F32 least[kVectors], mixture[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        mixture[v] = fma(et[v], factors.mixed_teacher, fma(es[v], factors.mixed_student, tiny));
        least[v] = max(tiny, p[v]);
      }
      log_quotient(least, mixture, slope);
      for (int v = 0; v < kVectors; ++v) {
        const F32 difference = load(scratch.ratio + at + v * kWidth);
        const F32 p_to_q = fma(difference, factors.a_low, fma(difference, factors.a, factors.shift));
        // The lower bound, below every log(Q / M) with Q > 0, is for 0 * log(0).
        const F32 of_q = max(min(sub(slope[v], p_to_q), factors.highest), set1(-200.0f));
        teacher_sum = fma(et[v], of_q, teacher_sum);
      }
    } else {
      for (int v = 0; v < kVectors; ++v) {
        const F32 q = mul(et[v], factors.teacher);
        slope[v] = select(less(q, p[v]), set1(0.5f), select(less(p[v], q), set1(-0.5f), set1(0.0f)));
        teacher_sum = fma(slope[v], sub(p[v], q), teacher_sum);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      slope[v] = mul(p[v], slope[v]);
      student_sum = add(student_sum, slope[v]);
      store(scratch.other + at + v * kWidth, slope[v]);
    }
  }

  PYKD_INLINE MixtureSums run(int64_t padded) {
    int64_t at = 0;
    for (; at + 2 * kWidth <= padded; at += 2 * kWidth) step<2>(at);
    if (at < padded) step<1>(at);
    return {reduce_add(teacher_sum), reduce_add(student_sum)};
  }
};

// The gradient of every direction is linear in what the scratch holds.
struct GradientFactors {
  float student, other, label, constant;
};

template <class T, int kLabel>
inline void write_gradient(T* gradient, int64_t count, const ChunkScratch& scratch, const GradientFactors& factors) {
  const F32 student = set1(factors.student), other = set1(factors.other), label = set1(factors.label);
  const F32 constant = set1(factors.constant);
  const auto at = [&](int64_t i) {
    const F32 es = load(scratch.student + i);
    F32 sum = constant;
    if (kLabel == kOwn)
      sum = fma(load(scratch.label + i), label, sum);
    else if (kLabel != kNone)
      sum = fma(label_power<kLabel>(es), label, sum);
    return fma(es, student, fma(load(scratch.other + i), other, sum));
  };
  int64_t i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) store_two(gradient + i, at(i), at(i + kWidth));
  for (; i + kWidth <= count; i += kWidth) store(gradient + i, at(i));
  if (i < count) store_n(gradient + i, at(i), count - i);
}

}  // namespace pykd::PYKD_LEVEL
