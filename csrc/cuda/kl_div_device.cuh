// What both distillation-loss kernels compute: sums of one row of logits, the row's factors, the gradient of a class.
//
// With a = 1 / temperature, k = a * log2(e) and the row's maxima as references, x_s = (s - s_max) k and x_t likewise:
//   s_sum = sum 2^x_s,  t_sum = sum 2^x_t,  cross = sum 2^x_t (x_t - x_s)  (reverse: sum 2^x_s (x_s - x_t))
//   forward = ln 2 (cross / t_sum + log2 s_sum - log2 t_sum), reverse likewise; jsd and tv sum over P = 2^x_s / s_sum.
// Every gradient is  2^x_s * student + 2^x_t * other + 2^x_label * label + constant  or a product of such terms, with
// factors per row: nothing of the size of a row is kept besides the logits.
//
// (s - s_max) is exact for logits of like size, so logits of 1e4 lose nothing. 2^x is one MUFU.EX2 (2 ulp); relative to
// the row's maximum, exponentials below 2^-126 are 0. x is held above kLowest, so that a class of probability 0 adds
// exactly 0 to `cross` instead of 0 * -inf; a class that one side lacks and the other has is found by `missing`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "ops.h"

namespace pykd::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -1e30f;
constexpr unsigned kWarp = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// The classes a thread handles at once: one 16-byte access to the student's row.
template <class S>
constexpr int kPack = 16 / static_cast<int>(sizeof(S));

template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Pack {
  T x[kCount];
};

template <class T, int kCount>
__device__ void load_pack(const T* from, float (&out)[kCount]) {
  const Pack<T, kCount> pack = *reinterpret_cast<const Pack<T, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = to_float(pack.x[i]);
}

template <class T, int kCount>
__device__ void store_pack(T* to, const float (&in)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.x[i] = from_float<T>(in[i]);
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

template <int kCount, class T>
__device__ bool is_aligned(const T* row) {
  return reinterpret_cast<uintptr_t>(row) % alignof(Pack<T, kCount>) == 0;
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float at_least(float x, float bound) {  // NaN stays NaN, unlike with fmaxf
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
  return y;
}

__device__ inline float reference(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// Where the label term's exponentials come from: there is none, they are the student's (temperature 1), or their own.
enum LabelExp : int { kNone, kShared, kOwn };

__device__ inline LabelExp label_exp(const KlDivArgs& args) {
  if (args.labels == nullptr || args.ce_weight == 0) return kNone;
  return args.temperature == 1.0 ? kShared : kOwn;
}

// Sums over some classes of a row, relative to the maxima of those classes. Empty: {-INFINITY, -INFINITY, 0, ...}.
struct Sums {
  float s_max, t_max;
  float s_sum, t_sum, label_sum, cross;
  float missing;  // not 0: a class with no student (reverse: teacher) logit has a teacher (student) logit
};

__device__ inline Sums no_sums() { return {-INFINITY, -INFINITY, 0, 0, 0, 0, 0}; }

// How far a reference rises, in powers of two; 0 from "nothing yet", finite whatever the logits are.
__device__ inline float rise(float from, float to, float k) {
  return from == -INFINITY ? 0.0f : fminf((to - from) * k, -kLowest);
}

template <int kDirection>
__device__ void rebase(Sums* x, float s_max, float t_max, float k) {
  const float ds = rise(x->s_max, s_max, k), dt = rise(x->t_max, t_max, k);
  const float fs = exp2_fast(-ds), ft = exp2_fast(-dt);
  if (kDirection == kForward) x->cross = (x->cross + x->t_sum * (ds - dt)) * ft;
  if (kDirection == kReverse) x->cross = (x->cross + x->s_sum * (dt - ds)) * fs;
  x->label_sum *= exp2_fast(-rise(x->s_max, s_max, kLog2e));
  x->s_sum *= fs;
  x->t_sum *= ft;
  x->s_max = s_max;
  x->t_max = t_max;
}

template <int kDirection>
__device__ void merge(Sums* x, Sums y, float k) {
  const float s_max = fmaxf(x->s_max, y.s_max), t_max = fmaxf(x->t_max, y.t_max);
  rebase<kDirection>(x, s_max, t_max, k);
  rebase<kDirection>(&y, s_max, t_max, k);
  x->s_sum += y.s_sum;
  x->t_sum += y.t_sum;
  x->label_sum += y.label_sum;
  x->cross += y.cross;
  x->missing += y.missing;
}

// Merges the sums of `lanes` (a power of two) neighbouring lanes; the first of them holds the result.
template <int kDirection>
__device__ Sums merge_lanes(Sums x, int lanes, float k) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    Sums y;
    y.s_max = __shfl_xor_sync(kWarp, x.s_max, step);
    y.t_max = __shfl_xor_sync(kWarp, x.t_max, step);
    y.s_sum = __shfl_xor_sync(kWarp, x.s_sum, step);
    y.t_sum = __shfl_xor_sync(kWarp, x.t_sum, step);
    y.label_sum = __shfl_xor_sync(kWarp, x.label_sum, step);
    y.cross = __shfl_xor_sync(kWarp, x.cross, step);
    y.missing = __shfl_xor_sync(kWarp, x.missing, step);
    merge<kDirection>(&x, y, k);
  }
  return x;
}

__device__ inline float add_lanes(float x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step);
  return x;
}

__device__ inline double add_lanes(double x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step);
  return x;
}

// Adds classes to the sums; x->s_max and x->t_max are at least the classes' maxima.
template <int kDirection, int kLabel, int kCount>
__device__ void add_classes(Sums* x, const float (&s)[kCount], const float (&t)[kCount], float k) {
  const float s0 = reference(x->s_max), t0 = reference(x->t_max);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float distance = s[i] - s0;
    const float xs = at_least(distance * k, kLowest), xt = at_least((t[i] - t0) * k, kLowest);
    const float es = exp2_fast(xs), et = exp2_fast(xt);
    x->s_sum += es;
    x->t_sum += et;
    if (kDirection == kForward) x->cross = fmaf(et, xt - xs, x->cross);
    if (kDirection == kReverse) x->cross = fmaf(es, xs - xt, x->cross);
    if (kLabel == kOwn) x->label_sum += exp2_fast(distance * kLog2e);
  }
}

// Whether a class adds infinity to the divergence: the weighting side has it and the other does not.
template <int kDirection>
__device__ bool is_missing(float s, float t) {
  if (kDirection == kForward) return s == -INFINITY && t != -INFINITY;
  return kDirection == kReverse && t == -INFINITY && s != -INFINITY;
}

// One row's constants for jsd's and tv's sums and for every gradient.
struct Factors {
  float s0, t0, k, beta;
  float p, q;                             // P = 2^x_s * p, Q = 2^x_t * q
  float student, other, label, constant;  // see class_gradient
  float mean;                             // reverse: the mean of x_s - x_t, subtracted before anything is rounded
  float at_label;                         // what the label's own class adds to `constant`
};

struct Mixture {
  float value, slope;  // sum of f(P); sum of P * g in units of Factors::other
};

__device__ inline bool nothing(const Sums& row) { return row.s_sum == 0 || row.t_sum == 0; }  // -inf throughout

__device__ inline Factors probabilities(const KlDivArgs& args, const Sums& row) {
  Factors f{};
  f.s0 = reference(row.s_max);
  f.t0 = reference(row.t_max);
  f.k = static_cast<float>(1.4426950408889634 / args.temperature);
  f.beta = static_cast<float>(args.beta);
  f.p = row.s_sum == 0 ? 0.0f : 1.0f / row.s_sum;
  f.q = row.t_sum == 0 ? 0.0f : 1.0f / row.t_sum;
  return f;
}

// jsd: P ln(P / M) and beta Q ln(Q / M), in units of ln 2, M = beta Q + (1 - beta) P. tv: P * sign(P - Q) and P
// sign(..)
__device__ inline float jsd_slope(float p, float mixture) {
  return p * log2_fast(fmaxf(__fdividef(p, mixture), FLT_MIN));
}
__device__ inline float tv_sign(float p, float q) { return p > q ? 1.0f : p < q ? -1.0f : 0.0f; }

template <int kDirection, int kCount>
__device__ void add_mixture(Mixture* x, const float (&s)[kCount], const float (&t)[kCount], const Factors& f) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float p = exp2_fast((s[i] - f.s0) * f.k) * f.p, q = exp2_fast((t[i] - f.t0) * f.k) * f.q;
    if (kDirection == kJsd) {
      const float mixture = fmaxf(f.beta * q + (1 - f.beta) * p, FLT_MIN), slope = jsd_slope(p, mixture);
      x->slope += slope;
      x->value += f.beta * jsd_slope(q, mixture) + (1 - f.beta) * slope;
    } else {
      const float sign = tv_sign(p, q);
      x->slope = fmaf(sign, p, x->slope);
      x->value = fmaf(sign, p - q, x->value);
    }
  }
}

// The factors of the gradient; `mixture` counts for jsd and tv.
template <int kDirection>
__device__ Factors gradient_factors(const KlDivArgs& args, const Sums& row, Mixture mixture, float scale) {
  Factors f = probabilities(args, row);
  const float weight = scale * static_cast<float>(args.kl_weight / args.temperature);
  if (row.s_sum != row.s_sum || row.t_sum != row.t_sum) {
    f.student = NAN;  // tv's signs would hide it
  } else if (nothing(row) || (kDirection == kReverse && row.missing != 0)) {
    f.student = f.other = 0;
  } else if (kDirection == kForward) {
    f.student = weight * f.p;
    f.other = -weight * f.q;
  } else if (kDirection == kReverse) {  // P (ln(P / Q) - value): the sums' logarithms cancel
    f.other = weight * kLn2 * f.p;
    f.mean = row.cross / row.s_sum;
  } else {
    f.other = weight * (kDirection == kJsd ? (1 - f.beta) * kLn2 : 0.5f);
    f.student = -f.other * mixture.slope * f.p;
  }
  const LabelExp exponentials = label_exp(args);
  if (exponentials == kNone || row.s_sum == 0) return f;
  const float label_weight = scale * static_cast<float>(args.ce_weight);
  if (exponentials == kShared)
    f.student += label_weight * f.p;
  else
    f.label = label_weight / row.label_sum;
  f.constant = -label_weight * static_cast<float>(args.label_smoothing / static_cast<double>(args.student_classes));
  f.at_label = -label_weight * static_cast<float>(1 - args.label_smoothing);
  return f;
}

template <int kDirection, int kLabel>
__device__ float class_gradient(float s, float t, const Factors& f, float constant) {
  const float distance = s - f.s0;
  const float xs = distance * f.k, xt = (t - f.t0) * f.k;
  const float es = exp2_fast(xs);
  float result = constant;
  if (kLabel == kOwn) result = fmaf(exp2_fast(distance * kLog2e), f.label, result);
  if (kDirection == kForward) return fmaf(es, f.student, fmaf(exp2_fast(xt), f.other, result));
  if (kDirection == kReverse)
    return fmaf(es, fmaf(at_least(xs, kLowest) - at_least(xt, kLowest) - f.mean, f.other, f.student), result);
  const float p = es * f.p, q = exp2_fast(xt) * f.q;
  float slope;
  if (kDirection == kJsd)
    slope = jsd_slope(p, fmaxf(f.beta * q + (1 - f.beta) * p, FLT_MIN));
  else
    slope = tv_sign(p, q) * p;
  return fmaf(slope, f.other, fmaf(es, f.student, result));
}

// The row's loss. Scalars of a row are double: the logarithms nearly cancel where student and teacher agree.
// label_logit = (1 - smoothing) * the label's logit + smoothing * the mean logit.
template <int kDirection>
__device__ float row_loss(const KlDivArgs& args, const Sums& row, Mixture mixture, double label_logit, float scale) {
  const double ln2 = 0.6931471805599453;
  double value;
  if (row.s_sum != row.s_sum || row.t_sum != row.t_sum)
    value = NAN;
  else if (nothing(row))
    value = row.s_sum == 0 && row.t_sum == 0 ? 0 : INFINITY;
  else if (row.missing != 0)
    value = INFINITY;
  else if (kDirection == kForward)
    value = ln2 * row.cross / row.t_sum + log(static_cast<double>(row.s_sum) / row.t_sum);
  else if (kDirection == kReverse)
    value = ln2 * row.cross / row.s_sum - log(static_cast<double>(row.s_sum) / row.t_sum);
  else
    value = mixture.value * (kDirection == kJsd ? ln2 : 0.5);
  double loss = args.kl_weight != 0 ? args.kl_weight * value : 0;
  const LabelExp exponentials = label_exp(args);
  if (exponentials != kNone) {
    const double sum = exponentials == kShared ? row.s_sum : row.label_sum;
    const double entropy = row.s_sum == 0 ? INFINITY : log(sum) + reference(row.s_max) - label_logit;
    loss += args.ce_weight * entropy;
  }
  return static_cast<float>(scale * loss);
}

// Runs `sweep` with the label's exponentials as a constant, so that the choice stays outside the loops.
template <class Sweep>
__device__ void with_label_exp(LabelExp exponentials, const Sweep& sweep) {
  if (exponentials == kNone)
    sweep(std::integral_constant<int, kNone>());
  else if (exponentials == kShared)
    sweep(std::integral_constant<int, kShared>());
  else
    sweep(std::integral_constant<int, kOwn>());
}

}  // namespace pykd::cuda
