// What kl_div_topk reads of one row: the kept classes with their targets, and the normalisers over the other classes
// and over all. kl_div_topk.cpp explains the schedule; it alone includes this.
#pragma once

#include <math.h>

#include "cpu/kl_div_chunks.h"

namespace pykd::PYKD_LEVEL {
namespace {

struct Kept {  // one distinct class that the teacher kept
  int64_t id;
  int64_t next;   // place of another one in the same chunk, or -1
  double logit;   // the student's
  double target;  // Q
};

struct Scratch {
  Kept* kept;                   // [kept]
  int64_t* first;               // [chunks] place of a kept class, or -1
  int32_t* place;               // [classes] 1 + place in `kept`; all 0 between rows
  float *exponentials, *label;  // one row each; 0 at the kept classes
  float* chunk;                 // staged logits
  float* reference;             // [chunks]
};

struct Row {
  int64_t kept = 0;              // distinct classes
  double mass = 0, rest = 0;     // sum Q, R
  double log_others, log_total;  // of e^(s / T): over the classes that are not kept, over all
  double label_log_total;        // of e^s over all
  double logit_sum = 0;          // label smoothing only
};

struct Context {
  const KlDivTopkArgs& args;
  int64_t chunks;
  double a;       // 1 / temperature
  int label_exp;  // LabelExp
  ScaledExp soft, hard;
};

double log_add(double x, double y) {
  const double high = x > y ? x : y, low = x > y ? y : x;
  if (x == y || low == -INFINITY) return x == y ? x + ::log(2.0) : high;
  return high + ::log1p(::exp(low - high));
}

double log_prob(const KlDivTopkArgs& args, int64_t i) {
  if (args.teacher_dtype == kFloat32) return static_cast<const float*>(args.log_probs)[i];
  if (args.teacher_dtype == kBFloat16) return to_float(static_cast<const BF16*>(args.log_probs)[i]);
  return to_float(static_cast<const F16*>(args.log_probs)[i]);
}

// Q ~ w^power with the sum of w.
void temper(double power, double mass, Kept* kept, int64_t count) {
  double highest = -INFINITY, sum = 0;
  for (int64_t n = 0; n < count; ++n) {
    kept[n].target = power * ::log(kept[n].target);
    if (kept[n].target > highest) highest = kept[n].target;
  }
  for (int64_t n = 0; n < count; ++n) sum += kept[n].target = ::exp(kept[n].target - highest);
  for (int64_t n = 0; n < count; ++n) kept[n].target *= mass / sum;
}

// The distinct kept classes of row r with their targets, before anything is overwritten.
template <class S>
void gather(const Context& c, const Scratch& scratch, const S* student, int64_t r, Row* row) {
  const KlDivTopkArgs& args = c.args;
  for (int64_t chunk = 0; chunk < c.chunks; ++chunk) scratch.first[chunk] = -1;
  for (int64_t i = r * args.kept; i < (r + 1) * args.kept; ++i) {
    const int64_t id = args.ids[i];
    if (id < 0) continue;
    const double weight = ::exp(log_prob(args, i));
    row->mass += weight;
    if (scratch.place[id] != 0) {
      scratch.kept[scratch.place[id] - 1].target += weight;
      continue;
    }
    int64_t* first = scratch.first + id / kChunk;
    scratch.kept[row->kept] = {id, *first, to_float(student[id]), weight};
    *first = row->kept++;
    scratch.place[id] = static_cast<int32_t>(row->kept);
  }
  for (int64_t n = 0; n < row->kept; ++n) scratch.place[scratch.kept[n].id] = 0;
  if (args.power != 1 && row->mass != 0) temper(args.power, row->mass, scratch.kept, row->kept);
  if (args.tail && row->kept < args.classes) row->rest = row->mass >= 1 ? 0 : 1 - row->mass;
}

// Exponentials of one chunk and their sums, several vectors in lock step.
template <int kLabel>
struct StudentExponentials {
  const float* logits;
  F32 reference;
  const ScaledExp &soft, &hard;
  float *exponentials, *label;
  const char* ahead;  // what is read next, fetched meanwhile
  int64_t bytes;      // per class
  F32 sum = set1(0.0f), label_sum = set1(0.0f);

  template <int kVectors, class Read>
  PYKD_INLINE void step(int64_t at, const Read& read) {
    constexpr int kEach = kLabel == kOwn ? 2 : 1;
    F32 x[kEach * kVectors], e[kEach * kVectors];
    const ScaledExp* constants[kEach * kVectors];
    for (int v = 0; v < kVectors; ++v)
      for (int i = 0; i < kEach; ++i) {
        x[kEach * v + i] = sub(read(logits + at + v * kWidth), reference);
        constants[kEach * v + i] = i == 0 ? &soft : &hard;
      }
    __builtin_prefetch(ahead + at * bytes);
    exp(x, constants, e);
    for (int v = 0; v < kVectors; ++v) {
      const F32 es = e[kEach * v], e1 = kLabel == kOwn ? e[kEach * v + kEach - 1] : label_power<kLabel>(es);
      store(exponentials + at + v * kWidth, es);
      sum = add(sum, es);
      if (kLabel == kOwn) store(label + at + v * kWidth, e1);
      if (kLabel != kNone) label_sum = add(label_sum, e1);
    }
  }

  // Lanes behind the last class hold -FLT_MAX, as in `Exponentials`.
  PYKD_INLINE void run(int64_t count) {
    int64_t at = 0;
    const auto whole = [](const float* x) { return load(x); };
    for (; at + 4 * kWidth <= count; at += 4 * kWidth) step<4>(at, whole);
    for (; at + kWidth <= count; at += kWidth) step<1>(at, whole);
    if (at < count) step<1>(at, [&](const float* x) { return load_n(x, count - at, -FLT_MAX); });
  }
};

// The chunk's logits as float32, -inf at the kept classes, and their maximum.
template <class S>
const float* stage_others(const Context& c, const Scratch& scratch, const S* student, int64_t chunk, int64_t count,
                          float* highest, Row* row) {
  const float* x = stage_chunk(student, count, count, scratch.chunk, highest);
  if (c.args.labels && c.args.label_smoothing != 0) {
    const float reference = *highest > -INFINITY ? *highest : 0.0f;
    row->logit_sum += sum_of_differences(x, count, reference) + static_cast<double>(count) * reference;
  }
  if (scratch.first[chunk] < 0) return x;
  if (x != scratch.chunk) ::memcpy(scratch.chunk, x, sizeof(float) * static_cast<size_t>(count));
  for (int64_t n = scratch.first[chunk]; n >= 0; n = scratch.kept[n].next)
    scratch.chunk[scratch.kept[n].id - chunk * kChunk] = -INFINITY;
  return stage_chunk(scratch.chunk, count, count, scratch.chunk, highest);
}

// Sums of one set of classes, relative to its reference.
struct Sums {
  double reference = 0, soft = 0, label = 0;
  bool finite = false;

  void raise(double a, double highest) {
    if (!(highest > -INFINITY) || (finite && highest <= reference)) return;
    if (finite) {
      soft *= ::exp(a * (reference - highest));
      label *= ::exp(reference - highest);
    }
    reference = highest;
    finite = true;
  }
};

template <class S, int kLabel>
Sums sum_others(const Context& c, const Scratch& scratch, const S* student, Row* row) {
  Sums sums;
  for (int64_t chunk = 0; chunk < c.chunks; ++chunk) {
    const int64_t begin = chunk * kChunk, left = c.args.classes - begin, count = left < kChunk ? left : kChunk;
    float highest;
    const float* x = stage_others(c, scratch, student + begin, chunk, count, &highest, row);
    sums.raise(c.a, highest);
    scratch.reference[chunk] = static_cast<float>(sums.reference);
    StudentExponentials<kLabel> run{x,
                                    set1(scratch.reference[chunk]),
                                    c.soft,
                                    c.hard,
                                    scratch.exponentials + begin,
                                    scratch.label ? scratch.label + begin : nullptr,
                                    reinterpret_cast<const char*>(student + begin + count),
                                    sizeof(S)};
    run.run(count);
    sums.soft += reduce_add(run.sum);
    sums.label += reduce_add(run.label_sum);
  }
  return sums;
}

Sums sum_kept(const Context& c, const Kept* kept, int64_t count) {
  Sums sums;
  for (int64_t n = 0; n < count; ++n) sums.raise(c.a, kept[n].logit);
  for (int64_t n = 0; n < count; ++n) {
    sums.soft += ::exp(c.a * (kept[n].logit - sums.reference));
    sums.label += ::exp(kept[n].logit - sums.reference);
  }
  return sums;
}

template <class S>
void read_row(const Context& c, const Scratch& scratch, const S* student, Row* row) {
  const Sums others = c.label_exp == kNone     ? sum_others<S, kNone>(c, scratch, student, row)
                      : c.label_exp == kOwn    ? sum_others<S, kOwn>(c, scratch, student, row)
                      : c.label_exp == kSquare ? sum_others<S, kSquare>(c, scratch, student, row)
                                               : sum_others<S, kFourth>(c, scratch, student, row);
  const Sums kept = sum_kept(c, scratch.kept, row->kept);
  row->log_others = ::log(others.soft) + c.a * others.reference;
  row->log_total = log_add(row->log_others, ::log(kept.soft) + c.a * kept.reference);
  row->label_log_total = row->log_total;  // T = 1
  if (c.label_exp)
    row->label_log_total = log_add(::log(others.label) + others.reference, ::log(kept.label) + kept.reference);
}

}  // namespace
}  // namespace pykd::PYKD_LEVEL
