// kl_div against softmaxes written out in double precision.
#include "check_rows.h"

namespace check {
namespace {

using pykd::KlDivArgs;

constexpr double kFlushed = 0x1p-126;  // exponentials below it are 0

void add_divergence(const KlDivArgs& args, const Row& lp, const Row& lq, double scale, Truth* truth) {
  const double a = 1 / args.temperature, w = scale * args.kl_weight;
  if (args.kl_weight == 0) return;
  if (lp.empty() || lq.empty()) {  // no distribution
    truth->loss += lp.empty() && lq.empty() ? 0 : w * HUGE_VAL;
    return;
  }
  const size_t classes = lp.size();
  const double beta = args.beta;
  Row g(classes), unsure(classes);
  double loss = 0, slope = 0, size = std::log(static_cast<double>(classes)) + 1, unsure_sum = 0;
  bool infinite = false;
  for (size_t i = 0; i < classes; ++i) {
    const double p = std::exp(lp[i]), q = std::exp(lq[i]), m = beta * q + (1 - beta) * p, gap = lp[i] - lq[i];
    double term = 0;
    if (args.direction == pykd::kForward) {
      infinite |= std::isinf(lp[i]) && !std::isinf(lq[i]);
      term = product(q, -gap);
    } else if (args.direction == pykd::kReverse) {
      infinite |= std::isinf(lq[i]) && !std::isinf(lp[i]);
      term = product(p, gap);
      g[i] = p == 0 ? 0 : gap;
    } else if (args.direction == pykd::kJsd) {
      g[i] = p == 0 ? 0 : (1 - beta) * std::log(p / m);
      term = p * g[i] + (q == 0 ? 0 : beta * q * std::log(q / m));
    } else {
      g[i] = p > q ? 0.5 : p < q ? -0.5 : 0;
      term = std::fabs(p - q) / 2;
      unsure[i] = std::fabs(p - q) < 2 * kEpsilon * (p + q) * (1 + std::fabs(gap)) ? p : 0;
      unsure_sum += unsure[i];
    }
    loss += term;
    size += std::fabs(term);
    slope += p * g[i];
  }
  if (infinite) loss = HUGE_VAL;
  truth->loss += w * loss;
  truth->loss_size += std::fabs(w) * size;
  for (size_t i = 0; i < truth->gradient.size(); ++i) {
    const double p = std::exp(lp[i]), q = std::exp(lq[i]);
    if (args.direction == pykd::kForward) {
      truth->gradient[i] += w * a * (p - q);
      truth->size[i] += std::fabs(w) * a * (p + q);
    } else if (!(args.direction == pykd::kReverse && infinite)) {
      truth->gradient[i] += w * a * product(p, g[i] - slope);
      const double factor = p == 0 ? 0 : std::fabs(g[i]) + std::fabs(slope) + size + std::fabs(lp[i]);
      truth->size[i] += std::fabs(w) * a * (p + kFlushed / kEpsilon) * factor +
                        std::fabs(w) * a * (unsure[i] + p * unsure_sum) / kEpsilon;
    }
  }
}

void run_case(Group& group, Random& random, KlDivArgs args, bool with_gradient, bool in_place, bool with_labels) {
  const int64_t rows = args.rows, students = args.student_classes, teachers = args.teacher_classes;
  const int64_t classes = std::max(students, teachers);
  const auto extent = [&](int64_t stride, int64_t width, int dtype) {
    return static_cast<size_t>((rows - 1) * stride + width) * size_of(dtype);
  };
  Buffer student(extent(args.student_stride, students, args.student_dtype));
  Buffer teacher(extent(args.teacher_stride, teachers, args.teacher_dtype));
  Buffer labels(static_cast<size_t>(rows) * 8), scale(static_cast<size_t>(rows) * 4);
  Buffer losses(static_cast<size_t>(rows) * 4), failure(8);
  Buffer gradient(extent(students, students, args.student_dtype));
  args.student = student.data();
  args.teacher = teacher.data();
  args.labels = with_labels ? labels.as<int64_t>() : nullptr;
  args.scale = scale.as<float>();
  args.losses = losses.as<float>();
  args.failure = failure.as<int64_t>();
  args.gradient = !with_gradient ? nullptr : in_place ? student.data() : gradient.data();

  std::vector<Truth> truths;
  for (int64_t r = 0; r < rows; ++r) {
    fill_row(random, student, r * args.student_stride, students, args.student_dtype, with_labels);
    fill_row(random, teacher, r * args.teacher_stride, teachers, args.teacher_dtype, false);
    labels.as<int64_t>()[r] = random.below(students);
    scale.as<float>()[r] = random.pick<float>({1.0f, 0.25f, 0.0f});
    const Row s = read_row(student, r * args.student_stride, students, classes, args.student_dtype);
    const Row t = read_row(teacher, r * args.teacher_stride, teachers, classes, args.teacher_dtype);
    Truth truth;
    truth.gradient.assign(static_cast<size_t>(students), 0);
    truth.size = truth.gradient;
    const double factor = scale.as<float>()[r], a = 1 / args.temperature;
    if (factor != 0) {
      add_divergence(args, log_softmax(s, a), log_softmax(t, a), factor, &truth);
      add_cross_entropy(args, Row(s.begin(), s.begin() + students), labels.as<int64_t>()[r], factor, &truth);
    }
    truths.push_back(truth);
  }
  pykd::table().kl_div(args);

  group.require(*args.failure == -1, "a failure was reported");
  for (int64_t r = 0; r < rows; ++r) {
    const Truth& truth = truths[static_cast<size_t>(r)];
    group.near("loss", r, args.losses[r], truth.loss, kEpsilon * truth.loss_size);
    for (int64_t i = 0; i < students && with_gradient; ++i) {
      const double want = truth.gradient[static_cast<size_t>(i)], size = truth.size[static_cast<size_t>(i)];
      group.near(
          "gradient", r * students + i, decode(args.gradient, r * students + i, args.student_dtype), want,
          kEpsilon * size + epsilon_of(args.student_dtype) * std::fabs(want) + tiny_of(args.student_dtype) + 1e-37);
    }
  }
  group.intact({&student, &teacher, &labels, &scale, &losses, &failure, &gradient});
}

void bad_label(const std::string& level) {
  Group group(level + " kl_div with a label out of range");
  for (const int64_t label : {-1, 5}) {
    group.begin("label %lld of 5 classes", static_cast<long long>(label));
    Buffer logits(40), labels(16), scale(8), losses(8), failure(8);
    labels.as<int64_t>()[0] = 0;
    labels.as<int64_t>()[1] = label;
    for (int i = 0; i < 10; ++i) logits.as<float>()[i] = static_cast<float>(i);
    scale.as<float>()[0] = scale.as<float>()[1] = 1;
    KlDivArgs args{logits.data(),
                   logits.data(),
                   labels.as<int64_t>(),
                   scale.as<float>(),
                   losses.as<float>(),
                   logits.data(),
                   failure.as<int64_t>(),
                   2,
                   5,
                   5,
                   5,
                   5,
                   0,
                   0,
                   pykd::kForward,
                   0.5,
                   2,
                   1,
                   1,
                   0,
                   1};
    pykd::table().kl_div(args);
    group.require(*args.failure == 1, "the row was not reported");
    for (int i = 0; i < 10; ++i) group.near("student", i, logits.as<float>()[i], i, 0);
  }
}

}  // namespace

void kl_div(const std::string& level) {
  Random random(3);
  for (int direction = pykd::kForward; direction <= pykd::kTv; ++direction) {
    static const char* const names[] = {"forward", "reverse", "jsd", "tv"};
    for (int student = 0; student < 3; ++student) {
      Group group(level + " kl_div " + names[direction] + ", " + name_of(student) + " student");
      for (const int64_t classes : {1, 2, 7, 15, 16, 17, 33, 100, 2047, 2048, 2049, 4096, 4113}) {
        KlDivArgs args{};
        args.rows = classes > 2000 ? 2 : 4;
        args.student_classes = classes;
        args.teacher_classes = std::max<int64_t>(1, classes + random.pick<int64_t>({0, 0, 3, -5, 17}));
        args.student_dtype = student;
        args.teacher_dtype = static_cast<int>(random.below(3));
        args.direction = direction;
        args.beta = random.pick<double>({0.5, 0.1});
        args.temperature = random.pick<double>({1, 2, 4, 0.5});
        args.kl_weight = random.pick<double>({1, 0.7, 0});
        args.ce_weight = random.pick<double>({0.3, 0, 1});
        const bool labels = random.chance(0.6), gradient = random.chance(0.85), in_place = random.chance(0.4);
        args.label_smoothing = labels ? random.pick<double>({0, 0.1}) : 0;
        args.student_stride = classes + (in_place ? 0 : random.below(4));
        args.teacher_stride = args.teacher_classes + random.below(4);
        args.threads = classes > 2000 ? 2 : 1;
        group.begin(
            "%lld classes, teacher %lld %s, temperature %g, weights %g %g, labels %d, smoothing %g, in place %d",
            static_cast<long long>(classes), static_cast<long long>(args.teacher_classes), name_of(args.teacher_dtype),
            args.temperature, args.kl_weight, args.ce_weight, labels, args.label_smoothing, gradient && in_place);
        run_case(group, random, args, gradient, in_place, labels);
      }
    }
  }
  bad_label(level);
}

}  // namespace check
