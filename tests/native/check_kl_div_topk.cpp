// kl_div_topk against the divergence from a target that is spread over the whole vocabulary, in double precision.
#include <map>

#include "check_rows.h"

namespace check {
namespace {

using pykd::KlDivTopkArgs;

// Class -> weight, of entries that may repeat; -1 is no entry.
using Target = std::map<int64_t, double>;

Target read_target(const KlDivTopkArgs& args, int64_t r) {
  Target target;
  double mass = 0, powers = 0;
  for (int64_t k = 0; k < args.kept; ++k) {
    const int64_t id = args.ids[r * args.kept + k];
    if (id >= 0) target[id] += std::exp(decode(args.log_probs, r * args.kept + k, args.teacher_dtype));
  }
  for (const auto& [id, weight] : target) {
    mass += weight;
    powers += std::pow(weight, args.power);
  }
  for (auto& [id, weight] : target) weight = powers == 0 ? 0 : mass * std::pow(weight, args.power) / powers;
  return target;
}

void add_divergence(const KlDivTopkArgs& args, const Row& student, const Target& target, double scale, Truth* truth) {
  const double a = 1 / args.temperature, w = scale * args.kl_weight;
  if (args.kl_weight == 0) return;
  const Row lp = log_softmax(student, a);
  double mass = 0, top = -HUGE_VAL, others = 0, loss = 0, size = 1 + std::log(static_cast<double>(student.size()));
  const auto add = [&](double q, double log_q_over_p) {
    loss += product(q, log_q_over_p);
    size += std::fabs(product(q, log_q_over_p)) + q;
  };
  for (const auto& [id, q] : target) {
    mass += q;
    add(q, std::log(q) - lp[static_cast<size_t>(id)]);
  }
  const auto is_other = [&](size_t i) { return target.count(static_cast<int64_t>(i)) == 0; };
  for (size_t i = 0; i < lp.size(); ++i) top = is_other(i) ? std::max(top, lp[i]) : top;
  for (size_t i = 0; i < lp.size(); ++i) others += is_other(i) ? std::exp(lp[i] - top) : 0;
  const double log_others = std::log(others) + top;  // its sum may be too small for a double
  const bool all_kept = target.size() == student.size();
  const double rest = args.tail && !all_kept ? std::max(0.0, 1 - mass) : 0;
  if (rest > 0) add(rest, std::log(rest) - log_others);
  truth->loss += w * loss;
  truth->loss_size += std::fabs(w) * size * (1 + mass);
  for (size_t i = 0; i < lp.size(); ++i) {
    const auto kept = target.find(static_cast<int64_t>(i));
    const double p = std::exp(lp[i]);
    const double q = kept != target.end() ? kept->second : rest == 0 ? 0 : rest * std::exp(lp[i] - log_others);
    truth->gradient[i] += w * a * (p * (mass + rest) - q);
    truth->size[i] += std::fabs(w) * a * (p * (mass + rest) + q) * (1 + args.power);
  }
}

void run_case(Group& group, Random& random, KlDivTopkArgs args, bool with_gradient, bool in_place, bool with_labels) {
  const auto count = [](int64_t n) { return static_cast<size_t>(n); };
  const int64_t rows = args.rows, classes = args.classes;
  Buffer student(count((rows - 1) * args.student_stride + classes) * size_of(args.student_dtype));
  Buffer ids(count(rows * args.kept) * 8), log_probs(count(rows * args.kept) * size_of(args.teacher_dtype));
  Buffer labels(count(rows) * 8), scale(count(rows) * 4), losses(count(rows) * 4), failure(8);
  Buffer gradient(count(rows * classes) * size_of(args.student_dtype));
  args.student = student.data();
  args.ids = ids.as<int64_t>();
  args.log_probs = log_probs.data();
  args.labels = with_labels ? labels.as<int64_t>() : nullptr;
  args.scale = scale.as<float>();
  args.losses = losses.as<float>();
  args.failure = failure.as<int64_t>();
  args.gradient = !with_gradient ? nullptr : in_place ? student.data() : gradient.data();

  std::vector<Truth> truths;
  for (int64_t r = 0; r < rows; ++r) {
    fill_row(random, student, r * args.student_stride, classes, args.student_dtype, true);
    for (int64_t k = 0; k < args.kept; ++k) {
      ids.as<int64_t>()[r * args.kept + k] = random.chance(0.1) ? -1 : random.below(classes);
      const double share = random.uniform() / static_cast<double>(args.kept) + 1e-4;
      encode(log_probs.data(), r * args.kept + k, args.teacher_dtype, std::log(share));
    }
    labels.as<int64_t>()[r] = random.below(classes);
    scale.as<float>()[r] = random.pick<float>({1.0f, 0.25f, 0.0f});
    const Row s = read_row(student, r * args.student_stride, classes, classes, args.student_dtype);
    Truth truth;
    truth.gradient.assign(count(classes), 0);
    truth.size = truth.gradient;
    const double factor = scale.as<float>()[r];
    if (factor != 0) {
      add_divergence(args, s, read_target(args, r), factor, &truth);
      add_cross_entropy(args, s, labels.as<int64_t>()[r], factor, &truth);
    }
    truths.push_back(truth);
  }
  pykd::table().kl_div_topk(args);

  group.require(*args.failure == -1, "a failure was reported");
  for (int64_t r = 0; r < rows; ++r) {
    const Truth& truth = truths[count(r)];
    group.near("loss", r, args.losses[r], truth.loss, kEpsilon * truth.loss_size);
    for (int64_t i = 0; i < classes && with_gradient; ++i) {
      const double want = truth.gradient[count(i)], size = truth.size[count(i)];
      group.near(
          "gradient", r * classes + i, decode(args.gradient, r * classes + i, args.student_dtype), want,
          kEpsilon * size + epsilon_of(args.student_dtype) * std::fabs(want) + tiny_of(args.student_dtype) + 1e-37);
    }
  }
  group.intact({&student, &ids, &log_probs, &labels, &scale, &losses, &failure, &gradient});
}

}  // namespace

void kl_div_topk(const std::string& level) {
  Random random(6);
  for (int tail = 0; tail < 2; ++tail) {
    for (int student = 0; student < 3; ++student) {
      Group group(level + " kl_div_topk " + (tail ? "with" : "without") + " tail, " + name_of(student) + " student");
      for (const int64_t classes : {1, 2, 7, 15, 16, 17, 33, 100, 2047, 2048, 2049, 4096, 4113}) {
        KlDivTopkArgs args{};
        args.rows = classes > 2000 ? 2 : 4;
        args.classes = classes;
        args.kept = random.pick<int64_t>({1, 3, 16, 20});
        args.student_dtype = student;
        args.teacher_dtype = static_cast<int>(random.below(3));
        args.tail = tail;
        args.temperature = random.pick<double>({1, 2, 4, 0.5});
        args.power = tail ? 1 : random.pick<double>({1, 0.5, 2});
        args.kl_weight = random.pick<double>({1, 0.7, 0});
        args.ce_weight = random.pick<double>({0.3, 0, 1});
        const bool labels = random.chance(0.6), gradient = random.chance(0.85), in_place = random.chance(0.4);
        args.label_smoothing = labels ? random.pick<double>({0, 0.1}) : 0;
        args.student_stride = classes + (in_place ? 0 : random.below(4));
        args.threads = classes > 2000 ? 2 : 1;
        group.begin("%lld classes, %lld kept as %s, temperature %g, power %g, weights %g %g, labels %d, smoothing %g",
                    static_cast<long long>(classes), static_cast<long long>(args.kept), name_of(args.teacher_dtype),
                    args.temperature, args.power, args.kl_weight, args.ce_weight, labels, args.label_smoothing);
        run_case(group, random, args, gradient, in_place, labels);
      }
    }
  }
}

}  // namespace check
