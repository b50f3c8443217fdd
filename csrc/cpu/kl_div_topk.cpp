// Softmax distillation from a teacher of which only some classes were kept: the divergence of softmax(student / T) from
// sparse weights q, mixed with the cross entropy of softmax(student) against hard labels, and the gradient of it all.
//
// One sweep over DRAM per row, as in kl_div.cpp: chunks of the student's logits, which stay in L1, their maximum, then
// their exponentials against the running maximum into per-thread scratch, and when the row ends the gradient from the
// scratch alone, in place if the caller wants. The kept classes take no part in the sweep: their logits are staged as
// -inf. They are few, so they are summed and differentiated on their own in float64, which
//   - leaves the mass of the other classes as a sum of its own, and not as 1 - the kept mass, however small it is;
//   - lets their gradient be written from exact parts over what the sweep wrote there.
// With a = 1 / T, P the student's probabilities, Q the target of the class, R what the teacher holds outside the kept
// classes (0 unless `tail`), O the student's mass there, N = sum Q + R:
//   loss      sum over kept Q (log Q - log P) + R (log R - log O)
//   gradient  a (N P - Q) at the kept classes, a (N - R / O) P at the others
// Sums within a chunk are float32, sums over chunks and every scalar of a row float64, normalisers as logarithms.
#include "cpu/kl_div_topk_row.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace pykd::PYKD_LEVEL {
namespace {

// e^x for x <= 0; a larger x belongs to a chunk without any finite logit, whose exponentials are all 0.
double bounded_exp(double x) { return ::exp(x > 0 ? 0.0 : x); }

double divergence(const Context& c, const Kept* kept, const Row& row) {
  if (row.log_total != row.log_total) return NAN;
  const double mass = row.mass + row.rest;
  if (row.log_total == -INFINITY) return mass == 0 ? 0 : mass * INFINITY;  // every logit is -inf: no distribution
  double value = 0;
  for (int64_t n = 0; n < row.kept; ++n)
    if (kept[n].target != 0) value += kept[n].target * (::log(kept[n].target) - (c.a * kept[n].logit - row.log_total));
  if (row.rest != 0) value += row.rest * (::log(row.rest) - (row.log_others - row.log_total));
  return value;
}

double cross_entropy(const KlDivTopkArgs& args, const Row& row, double label_logit) {
  if (row.label_log_total == -INFINITY) return INFINITY;
  const double value = row.label_log_total - label_logit;
  if (args.label_smoothing == 0) return value;
  const double uniform = row.label_log_total - row.logit_sum / static_cast<double>(args.classes);
  return (1 - args.label_smoothing) * value + args.label_smoothing * uniform;
}

// Weights of a row's two terms in its gradient; both 0 where the student has no distribution.
struct Weights {
  double kl, label;
};

// The gradient of every class that is not kept, from the exponentials of its chunk.
GradientFactors gradient_factors(const Context& c, const Row& row, const Weights& weights, float reference) {
  double student = 0, label = 0;
  const double p = bounded_exp(c.a * reference - row.log_total);
  if (weights.kl != 0) student = weights.kl * (row.mass + row.rest) * p;
  if (weights.kl != 0 && row.rest != 0 && row.log_others != -INFINITY) {
    const double others = ::exp(row.log_others - row.log_total);
    student = weights.kl * bounded_exp(c.a * reference - row.log_others) *
              (others * (row.mass + row.rest) - row.rest);  // which does not overflow where `others` is nearly 0
  }
  if (weights.label != 0) {
    if (c.label_exp)
      label = weights.label * bounded_exp(reference - row.label_log_total);
    else
      student += weights.label * p;
  }
  const double uniform = c.args.label_smoothing / static_cast<double>(c.args.classes);
  return {static_cast<float>(student), 0.0f, static_cast<float>(label), static_cast<float>(-weights.label * uniform)};
}

// The gradient of one class from its logit and its targets in both terms.
double exact_gradient(const Context& c, const Row& row, const Weights& weights, double logit, double target,
                      double label_target) {
  const double uniform = c.args.label_smoothing / static_cast<double>(c.args.classes);
  double value = 0;
  if (weights.kl != 0) value += weights.kl * ((row.mass + row.rest) * ::exp(c.a * logit - row.log_total) - target);
  if (weights.label != 0) value += weights.label * (::exp(logit - row.label_log_total) - uniform - label_target);
  return value;
}

template <class S, int kLabel>
void write_others(const Context& c, const Scratch& scratch, const Row& row, const Weights& weights, S* gradient) {
  for (int64_t chunk = 0; chunk < c.chunks; ++chunk) {
    const int64_t begin = chunk * kChunk, left = c.args.classes - begin, count = left < kChunk ? left : kChunk;
    float *e = scratch.exponentials + begin, *label = scratch.label ? scratch.label + begin : nullptr;
    write_gradient<S, kLabel>(gradient + begin, count, {e, e, label},
                              gradient_factors(c, row, weights, scratch.reference[chunk]));
  }
}

template <class S>
void write_row(const Context& c, const Scratch& scratch, const Row& row, const Weights& weights, int64_t label,
               double label_logit, S* gradient) {
  if (c.label_exp == kNone)
    write_others<S, kNone>(c, scratch, row, weights, gradient);
  else if (c.label_exp == kOwn)
    write_others<S, kOwn>(c, scratch, row, weights, gradient);
  else if (c.label_exp == kSquare)
    write_others<S, kSquare>(c, scratch, row, weights, gradient);
  else
    write_others<S, kFourth>(c, scratch, row, weights, gradient);
  const auto write = [&](int64_t id, double logit, double target) {
    const double label_target = id == label ? 1 - c.args.label_smoothing : 0;
    gradient[id] = from_float<S>(static_cast<float>(exact_gradient(c, row, weights, logit, target, label_target)));
  };
  // Not by correcting stored values, which would lose what bf16 and fp16 rounded away.
  if (label >= 0) {
    const bool shares = row.rest != 0 && label_logit != -INFINITY;
    write(label, label_logit, shares ? row.rest * ::exp(c.a * label_logit - row.log_others) : 0.0);
  }
  for (int64_t n = 0; n < row.kept; ++n) write(scratch.kept[n].id, scratch.kept[n].logit, scratch.kept[n].target);
}

template <class S>
void run_row(const Context& c, const Scratch& scratch, int64_t r) {
  const KlDivTopkArgs& args = c.args;
  const double scale = args.scale[r];
  S* gradient = args.gradient ? static_cast<S*>(args.gradient) + r * args.classes : nullptr;
  args.losses[r] = 0;
  if (scale == 0) {
    if (gradient) ::memset(static_cast<void*>(gradient), 0, sizeof(S) * static_cast<size_t>(args.classes));
    return;
  }
  const S* student = static_cast<const S*>(args.student) + r * args.student_stride;
  const bool labelled = args.labels && args.ce_weight != 0;
  const int64_t label = labelled ? args.labels[r] : -1;
  const double label_logit = labelled ? to_float(student[label]) : 0;
  Row row;
  gather(c, scratch, student, r, &row);
  read_row(c, scratch, student, &row);
  double loss = 0;
  if (args.kl_weight != 0) loss += args.kl_weight * divergence(c, scratch.kept, row);
  if (labelled) loss += args.ce_weight * cross_entropy(args, row, label_logit);
  args.losses[r] = static_cast<float>(scale * loss);
  if (gradient == nullptr) return;
  Weights weights{scale * args.kl_weight * c.a, labelled ? scale * args.ce_weight : 0};
  if (row.log_total == -INFINITY) weights = {0, 0};
  write_row(c, scratch, row, weights, label, label_logit, gradient);
}

// Lays the scratch of one thread out; false when there is no memory.
bool lay_out(const Context& c, Scratch* scratch) {
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  const int64_t row = c.chunks * kChunk + kWidth, rows = c.label_exp == kOwn ? 2 : 1;
  const int64_t floats = rows * row + kChunk + kWidth + c.chunks;
  char* memory =
      static_cast<char*>(thread_scratch(sizeof(Kept) * size(c.args.kept) + sizeof(int64_t) * size(c.chunks) +
                                        sizeof(int32_t) * size(c.args.classes) + sizeof(float) * size(floats)));
  if (memory == nullptr) return false;
  scratch->kept = reinterpret_cast<Kept*>(memory);
  scratch->first = reinterpret_cast<int64_t*>(scratch->kept + c.args.kept);
  scratch->exponentials = reinterpret_cast<float*>(scratch->first + c.chunks);
  scratch->label = rows == 2 ? scratch->exponentials + row : nullptr;
  scratch->chunk = scratch->exponentials + rows * row;
  scratch->reference = scratch->chunk + kChunk + kWidth;
  scratch->place = reinterpret_cast<int32_t*>(scratch->reference + c.chunks);
  ::memset(scratch->place, 0, sizeof(int32_t) * size(c.args.classes));
  return true;
}

template <class S>
void run_rows(const Context& c) {
  constexpr int64_t kGrain = 16384;  // classes per thread that are worth waking one
  const int64_t grain = (kGrain + c.args.classes - 1) / c.args.classes;
  parallel_for(c.args.rows, grain, c.args.threads, [&](int64_t first, int64_t last, int) {
    Scratch scratch;
    if (!lay_out(c, &scratch)) {
      __atomic_store_n(c.args.failure, int64_t{-2}, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t r = first; r < last; ++r) run_row<S>(c, scratch, r);
  });
}

int choose_label_exp(const KlDivTopkArgs& args) {
  if (args.labels == nullptr || args.ce_weight == 0 || args.temperature == 1.0) return kNone;
  return args.temperature == 2.0 ? kSquare : args.temperature == 4.0 ? kFourth : kOwn;
}

// The first row with a label, or rows + the first row with an id, that is no class; -1 if there is none.
int64_t find_failure(const KlDivTopkArgs& args) {
  for (int64_t r = 0; args.labels && r < args.rows; ++r)
    if (args.scale[r] != 0 && (args.labels[r] < 0 || args.labels[r] >= args.classes)) return r;
  for (int64_t i = 0; i < args.rows * args.kept; ++i)
    if (args.scale[i / args.kept] != 0 && (args.ids[i] < -1 || args.ids[i] >= args.classes))
      return args.rows + i / args.kept;
  return -1;
}

}  // namespace

void kl_div_topk(const KlDivTopkArgs& args) {
  *args.failure = find_failure(args);  // before anything is written: an in-place call with a bad id changes nothing
  if (*args.failure >= 0) return;
  const double a = 1.0 / args.temperature;
  const Context context{args,           (args.classes + kChunk - 1) / kChunk, a, choose_label_exp(args), scaled_exp(a),
                        scaled_exp(1.0)};
  if (args.student_dtype == kFloat32)
    run_rows<float>(context);
  else if (args.student_dtype == kBFloat16)
    run_rows<BF16>(context);
  else
    run_rows<F16>(context);
}

}  // namespace pykd::PYKD_LEVEL
