// Softmax distillation losses: divergence between softmax(student / T) and softmax(teacher / T), mixed with the cross
// entropy of softmax(student) against hard labels, and the gradient of it all by the student's logits.
//
// One sweep over DRAM per row. The row is read in chunks that stay in L1: first their maximum, then their exponentials
// against the running maximum, which go to per-thread scratch (L2 or L3) with that chunk's reference. When the row
// ends, its normalisers are known, and the gradient is written from the scratch alone: every direction's gradient is
//   e_s * a + other * b + e_label * c + constant,   with factors per chunk that also undo the chunk's reference.
// So the logits are read once, the gradient is written once, in place if the caller wants, and nothing else is
// of the size rows x classes. jsd and tv add one sweep over the scratch, because they need both normalisers first.
//
// With a = 1 / T, P and Q the student's and the teacher's probabilities, log P - log Q = L:
//   forward  sum Q (log Q - log P)     gradient a (P - Q)
//   reverse  sum P (log P - log Q)     gradient a P (L - reverse)
//   jsd, tv  f(P)                      gradient a P (g - sum P g),  g = df / dP
// Sums within a chunk are float32, sums over chunks and every scalar of a row float64.
#include <math.h>

#include "cpu/kl_div_chunks.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace pykd::PYKD_LEVEL {
namespace {

struct Scratch {
  float *student, *other, *label, *ratio;        // one row each, see ChunkScratch
  float *student_chunk, *teacher_chunk;          // staged logits
  float *student_reference, *teacher_reference;  // one per chunk
  float *student_sum, *teacher_sum;              // of a chunk's exponentials
};

// What one row's logits amount to. Sums are relative to the last references.
struct Row {
  double student_reference = 0, teacher_reference = 0;
  double student_sum = 0, teacher_sum = 0, label_sum = 0, cross = 0, smooth = 0;
  double log_ratio = 0;  // of student_sum to teacher_sum
  bool infinite = false;
};

struct Context {
  const KlDivArgs& args;
  int64_t classes, chunks;
  double a;       // 1 / temperature
  int label_exp;  // LabelExp
  ScaledExp soft, hard;
};

double power(double exponent) { return exponent < 0 ? ::exp(exponent) : exponent != exponent ? exponent : 1.0; }

// Moves the sums to new references; both only ever rise, or leave the 0 that stands for "nothing finite yet".
void rebase(const Context& c, Row* row, float student_reference, float teacher_reference) {
  const double student_step = row->student_reference - student_reference;
  const double teacher_step = row->teacher_reference - teacher_reference;
  if (student_step == 0 && teacher_step == 0) return;
  row->student_reference = student_reference;
  row->teacher_reference = teacher_reference;
  if (row->student_sum == 0 && row->teacher_sum == 0) return;  // nothing to move yet: each row's first chunk
  const double fs = power(c.a * student_step), ft = power(c.a * teacher_step);
  const bool reverse = c.args.direction == kReverse;
  const double drift = reverse ? student_step - teacher_step : teacher_step - student_step;
  row->cross = (row->cross + (reverse ? row->student_sum : row->teacher_sum) * drift) * (reverse ? fs : ft);
  row->student_sum *= fs;
  row->teacher_sum *= ft;
  row->label_sum *= power(student_step);
}

ChunkScratch chunk_scratch(const Scratch& scratch, int64_t begin) {
  return {scratch.student + begin, scratch.other + begin, scratch.label ? scratch.label + begin : nullptr,
          scratch.ratio ? scratch.ratio + begin : nullptr};
}

template <int kDirection, int kLabel>
ChunkSums run_chunk(const Context& c, const Scratch& scratch, const float* student, const float* teacher, int64_t chunk,
                    int64_t count, const Ahead& ahead) {
  const ChunkScratch at = chunk_scratch(scratch, chunk * kChunk);
  const F32 s0 = set1(scratch.student_reference[chunk]), t0 = set1(scratch.teacher_reference[chunk]);
  ChunkSums sums =
      Exponentials<kDirection, kLabel, false>{student, teacher, s0, t0, c.soft, c.hard, at, ahead}.run(count);
  if (!(sums.cross - sums.cross == 0))  // NaN or infinite
    sums = Exponentials<kDirection, kLabel, true>{student, teacher, s0, t0, c.soft, c.hard, at, ahead}.run(count);
  return sums;
}

template <int kDirection>
ChunkSums run_chunk(const Context& c, const Scratch& scratch, const float* student, const float* teacher, int64_t chunk,
                    int64_t count, const Ahead& ahead) {
  switch (c.label_exp) {
    case kNone:
      return run_chunk<kDirection, kNone>(c, scratch, student, teacher, chunk, count, ahead);
    case kOwn:
      return run_chunk<kDirection, kOwn>(c, scratch, student, teacher, chunk, count, ahead);
    case kSquare:
      return run_chunk<kDirection, kSquare>(c, scratch, student, teacher, chunk, count, ahead);
    default:
      return run_chunk<kDirection, kFourth>(c, scratch, student, teacher, chunk, count, ahead);
  }
}

template <class S, class T>
Row read_row(const Context& c, const Scratch& scratch, const S* student, const T* teacher) {
  const KlDivArgs& args = c.args;
  Row row;
  bool student_finite = false, teacher_finite = false;
  for (int64_t chunk = 0; chunk < c.chunks; ++chunk) {
    const int64_t begin = chunk * kChunk, left = c.classes - begin, count = left < kChunk ? left : kChunk;
    float s_max, t_max;
    const float* s = stage_chunk(student + begin, args.student_classes - begin, count, scratch.student_chunk, &s_max);
    const float* t = stage_chunk(teacher + begin, args.teacher_classes - begin, count, scratch.teacher_chunk, &t_max);
    float s0 = static_cast<float>(row.student_reference), t0 = static_cast<float>(row.teacher_reference);
    if (s_max > -INFINITY && (!student_finite || s_max > s0)) s0 = s_max;
    if (t_max > -INFINITY && (!teacher_finite || t_max > t0)) t0 = t_max;
    student_finite |= s_max > -INFINITY;
    teacher_finite |= t_max > -INFINITY;
    rebase(c, &row, s0, t0);
    scratch.student_reference[chunk] = s0;
    scratch.teacher_reference[chunk] = t0;

    const Ahead ahead{reinterpret_cast<const char*>(student + begin + count),
                      reinterpret_cast<const char*>(teacher + begin + count), sizeof(S), sizeof(T)};
    ChunkSums sums;
    if (args.direction == kForward)
      sums = run_chunk<kForward>(c, scratch, s, t, chunk, count, ahead);
    else if (args.direction == kReverse)
      sums = run_chunk<kReverse>(c, scratch, s, t, chunk, count, ahead);
    else if (args.direction == kJsd)
      sums = run_chunk<kJsd>(c, scratch, s, t, chunk, count, ahead);
    else
      sums = run_chunk<kTv>(c, scratch, s, t, chunk, count, ahead);
    scratch.student_sum[chunk] = sums.student;
    scratch.teacher_sum[chunk] = sums.teacher;
    row.student_sum += sums.student;
    row.teacher_sum += sums.teacher;
    row.label_sum += sums.label;
    row.cross += sums.cross;
    row.infinite |= sums.infinite;
    if (args.labels && args.label_smoothing != 0) {
      const int64_t present = args.student_classes - begin < count ? args.student_classes - begin : count;
      // The differences so far were taken from an older reference; `smooth` is kept absolute instead.
      if (present > 0) row.smooth += sum_of_differences(s, present, s0) + static_cast<double>(present) * s0;
    }
  }
  row.log_ratio = ::log(row.student_sum / row.teacher_sum);
  return row;
}

struct Divergence {
  double value;
  double slope = 0;   // jsd, tv: sum of P * g
  bool flat = false;  // no gradient: the divergence is infinite by P, or there is no distribution
};

// log P - log Q of a class of a chunk is a (ds - dt) plus this.
double chunk_shift(const Context& c, const Scratch& scratch, const Row& row, int64_t chunk) {
  const double s_step = scratch.student_reference[chunk] - row.student_reference;
  const double t_step = scratch.teacher_reference[chunk] - row.teacher_reference;
  return c.a * (s_step - t_step) - row.log_ratio;
}

// A factor as float32 and what that is off by, relatively. The error is the same for every class of a chunk, so that it
// would not average out as rounding does: the sums are corrected for it.
struct Rounded {
  float value;
  double error;
  explicit Rounded(double exact)
      : value(static_cast<float>(exact)), error(exact > 0 ? static_cast<double>(value) / exact - 1 : 0) {}
};

template <int kDirection>
Divergence mixture_of_row(const Context& c, const Scratch& scratch, const Row& row) {
  const double beta = c.args.beta;
  const float a = static_cast<float>(c.a), a_low = static_cast<float>(c.a - a);
  double value = 0, student = 0;
  for (int64_t chunk = 0; chunk < c.chunks; ++chunk) {
    const int64_t begin = chunk * kChunk, left = c.classes - begin, count = left < kChunk ? left : kChunk;
    const double fs = power(c.a * (scratch.student_reference[chunk] - row.student_reference)) / row.student_sum;
    const double ft = power(c.a * (scratch.teacher_reference[chunk] - row.teacher_reference)) / row.teacher_sum;
    const double shift = chunk_shift(c, scratch, row, chunk);
    const Rounded p(fs), mixed_student((1 - beta) * fs), mixed_teacher(beta * ft);
    const float near = static_cast<float>(shift);
    const MixtureFactors factors{set1(p.value),
                                 set1(static_cast<float>(ft)),
                                 set1(mixed_student.value),
                                 set1(mixed_teacher.value),
                                 set1(near),
                                 set1(a),
                                 set1(a_low),
                                 set1(static_cast<float>(-::log(beta)))};
    const MixtureSums sums = Mixture<kDirection>{chunk_scratch(scratch, begin), factors}.run(round_up(count, kWidth));
    student += sums.student;
    if (kDirection == kTv) {
      value += sums.teacher;
      continue;
    }
    const double of_teacher = p.error - mixed_teacher.error - (static_cast<double>(near) - shift);
    const double of_student = p.error - mixed_student.error;
    value += beta * ft * (sums.teacher - of_teacher * scratch.teacher_sum[chunk]) +
             (1 - beta) * (sums.student / (1 + p.error) - of_student * fs * scratch.student_sum[chunk]);
  }
  return {value, student};
}

Divergence divergence(const Context& c, const Scratch& scratch, const Row& row) {
  if (row.student_sum != row.student_sum || row.teacher_sum != row.teacher_sum) return {NAN};
  if (row.student_sum == 0 || row.teacher_sum == 0) {  // every logit is -inf: no distribution
    const bool both = row.student_sum == 0 && row.teacher_sum == 0;
    return {both ? 0.0 : static_cast<double>(INFINITY), 0, true};
  }
  switch (c.args.direction) {
    case kForward:
      return {row.infinite ? INFINITY : c.a * row.cross / row.teacher_sum + row.log_ratio};
    case kReverse:
      return {row.infinite ? INFINITY : c.a * row.cross / row.student_sum - row.log_ratio, 0, row.infinite};
    case kJsd:
      return mixture_of_row<kJsd>(c, scratch, row);
    default:
      return mixture_of_row<kTv>(c, scratch, row);
  }
}

double cross_entropy(const Context& c, const Row& row, double label_logit) {
  const KlDivArgs& args = c.args;
  const double sum = c.label_exp ? row.label_sum : row.student_sum;
  const double log_sum = ::log(sum) + row.student_reference;
  double value = log_sum - label_logit;
  if (sum == 0) return INFINITY;
  if (args.label_smoothing != 0) {
    const double uniform = log_sum - row.smooth / static_cast<double>(args.student_classes);
    value = (1 - args.label_smoothing) * value + args.label_smoothing * uniform;
  }
  return value;
}

GradientFactors gradient_factors(const Context& c, const Scratch& scratch, const Row& row, const Divergence& kl,
                                 double scale, int64_t chunk) {
  const KlDivArgs& args = c.args;
  const double s_step = scratch.student_reference[chunk] - row.student_reference;
  const double t_step = scratch.teacher_reference[chunk] - row.teacher_reference;
  const double p = power(c.a * s_step) / row.student_sum;
  const double weight = scale * args.kl_weight * c.a;
  double student = 0, other = 0, label = 0, constant = 0;
  if (kl.value != kl.value) {
    student = NAN;  // tv's signs would hide a NaN
  } else if (kl.flat || args.kl_weight == 0) {
  } else if (args.direction == kForward) {
    student = weight * p;
    other = -weight * power(c.a * t_step) / row.teacher_sum;
  } else if (args.direction == kReverse) {  // a P (L - reverse), L = a (ds - dt) + a constant of the chunk
    student = weight * p * (chunk_shift(c, scratch, row, chunk) - kl.value);
    other = weight * p * c.a;
  } else {
    const double slope = args.direction == kJsd ? 1 - args.beta : 1.0;
    student = -weight * slope * kl.slope * p;
    other = weight * slope;
  }
  const double label_weight = scale * args.ce_weight;
  if (args.labels && args.ce_weight != 0 && row.student_sum != 0) {
    if (c.label_exp)
      label = label_weight * power(s_step) / row.label_sum;
    else
      student += label_weight * p;
    constant = -label_weight * args.label_smoothing / static_cast<double>(args.student_classes);
  }
  return {static_cast<float>(student), static_cast<float>(other), static_cast<float>(label),
          static_cast<float>(constant)};
}

double label_exponential(const Context& c, const ChunkScratch& at, int64_t i) {
  if (c.label_exp == kOwn) return at.label[i];
  const double square = static_cast<double>(at.student[i]) * at.student[i];
  return c.label_exp == kFourth ? square * square : square;  // not used without a label exponential: factor 0
}

template <class S>
void write_row(const Context& c, const Scratch& scratch, const Row& row, const Divergence& kl, double scale,
               int64_t label, S* gradient) {
  const KlDivArgs& args = c.args;
  for (int64_t chunk = 0; chunk * kChunk < args.student_classes; ++chunk) {
    const int64_t begin = chunk * kChunk, left = args.student_classes - begin, count = left < kChunk ? left : kChunk;
    const GradientFactors factors = gradient_factors(c, scratch, row, kl, scale, chunk);
    const ChunkScratch at = chunk_scratch(scratch, begin);
    switch (c.label_exp) {
      case kNone:
        write_gradient<S, kNone>(gradient + begin, count, at, factors);
        break;
      case kOwn:
        write_gradient<S, kOwn>(gradient + begin, count, at, factors);
        break;
      case kSquare:
        write_gradient<S, kSquare>(gradient + begin, count, at, factors);
        break;
      default:
        write_gradient<S, kFourth>(gradient + begin, count, at, factors);
    }
    if (args.labels && label >= begin && label < begin + count && args.ce_weight != 0 && row.student_sum != 0) {
      // Again from float32 parts: correcting the stored value would lose what bf16 and fp16 rounded away.
      const int64_t i = label - begin;
      const double target = scale * args.ce_weight * (1 - args.label_smoothing);
      double value = static_cast<double>(at.student[i]) * factors.student +
                     static_cast<double>(at.other[i]) * factors.other + factors.constant - target;
      value += label_exponential(c, at, i) * factors.label;
      gradient[label] = from_float<S>(static_cast<float>(value));
    }
  }
}

template <class S, class T>
void run_row(const Context& c, const Scratch& scratch, int64_t r) {
  const KlDivArgs& args = c.args;
  const double scale = args.scale[r];
  S* gradient = args.gradient ? static_cast<S*>(args.gradient) + r * args.student_classes : nullptr;
  args.losses[r] = 0;
  if (scale == 0) {
    if (gradient) ::memset(static_cast<void*>(gradient), 0, sizeof(S) * static_cast<size_t>(args.student_classes));
    return;
  }
  const S* student = static_cast<const S*>(args.student) + r * args.student_stride;
  const T* teacher = static_cast<const T*>(args.teacher) + r * args.teacher_stride;
  const int64_t label = args.labels ? args.labels[r] : 0;
  const double label_logit = args.labels ? to_float(student[label]) : 0;  // read before it may be overwritten
  const Row row = read_row(c, scratch, student, teacher);
  const Divergence kl = divergence(c, scratch, row);
  double loss = 0;
  if (args.kl_weight != 0) loss += args.kl_weight * kl.value;
  if (args.labels && args.ce_weight != 0) loss += args.ce_weight * cross_entropy(c, row, label_logit);
  args.losses[r] = static_cast<float>(scale * loss);
  if (gradient) write_row(c, scratch, row, kl, scale, label, gradient);
}

// Lays the scratch of one thread out; false when there is no memory.
bool lay_out(const Context& c, Scratch* scratch) {
  const int64_t row = c.chunks * kChunk + kWidth, chunk = kChunk + kWidth;
  const bool label = c.label_exp == kOwn, ratio = c.args.direction == kJsd;
  const int64_t rows = 2 + label + ratio;
  float* memory =
      static_cast<float*>(thread_scratch(sizeof(float) * static_cast<size_t>(rows * row + 2 * chunk + 4 * c.chunks)));
  if (memory == nullptr) return false;
  scratch->student_chunk = memory;
  scratch->teacher_chunk = memory + chunk;
  scratch->student = memory + 2 * chunk;
  scratch->other = scratch->student + row;
  scratch->label = label ? scratch->other + row : nullptr;
  scratch->ratio = ratio ? scratch->student + (rows - 1) * row : nullptr;
  scratch->student_reference = scratch->student + rows * row;
  scratch->teacher_reference = scratch->student_reference + c.chunks;
  scratch->student_sum = scratch->teacher_reference + c.chunks;
  scratch->teacher_sum = scratch->student_sum + c.chunks;
  return true;
}

template <class S, class T>
void run_rows(const Context& c) {
  constexpr int64_t kGrain = 16384;  // classes per thread that are worth waking one
  const int64_t grain = (kGrain + c.classes - 1) / (c.classes > 0 ? c.classes : 1);
  parallel_for(c.args.rows, grain, c.args.threads, [&](int64_t first, int64_t last, int) {
    Scratch scratch;
    if (!lay_out(c, &scratch)) {
      __atomic_store_n(c.args.failure, int64_t{-2}, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t r = first; r < last; ++r) run_row<S, T>(c, scratch, r);
  });
}

template <class S>
void run_teacher(const Context& c) {
  if (c.args.teacher_dtype == kFloat32)
    run_rows<S, float>(c);
  else if (c.args.teacher_dtype == kBFloat16)
    run_rows<S, BF16>(c);
  else
    run_rows<S, F16>(c);
}

int choose_label_exp(const KlDivArgs& args) {
  if (args.labels == nullptr || args.ce_weight == 0 || args.temperature == 1.0) return kNone;
  return args.temperature == 2.0 ? kSquare : args.temperature == 4.0 ? kFourth : kOwn;
}

}  // namespace

void kl_div(const KlDivArgs& args) {
  *args.failure = -1;
  if (args.labels)  // before anything is written: an in-place call with a bad label changes nothing
    for (int64_t r = 0; r < args.rows; ++r)
      if (args.scale[r] != 0 && (args.labels[r] < 0 || args.labels[r] >= args.student_classes)) {
        *args.failure = r;
        return;
      }
  const int64_t classes = args.student_classes > args.teacher_classes ? args.student_classes : args.teacher_classes;
  const double a = 1.0 / args.temperature;
  const Context context{args,          classes,        (classes + kChunk - 1) / kChunk, a, choose_label_exp(args),
                        scaled_exp(a), scaled_exp(1.0)};
  if (args.student_dtype == kFloat32)
    run_teacher<float>(context);
  else if (args.student_dtype == kBFloat16)
    run_teacher<BF16>(context);
  else
    run_teacher<F16>(context);
}

}  // namespace pykd::PYKD_LEVEL
