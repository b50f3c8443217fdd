// Distillation losses and their gradient, one block per row of logits: the meaning is that of csrc/cpu/kl_div.cpp.
//
// Sweep 1 (one DRAM read of both rows): every thread keeps maximum and normaliser of what it has seen (online softmax),
// 16 bytes per load where rows are aligned; one block reduction merges them. Then `forward` takes one more sweep for
// its value and gradient together; the other directions need their row sums before the gradient and take a sweep
// between. While the rows in flight fit in L2 the later sweeps do not reach DRAM. The gradient may overwrite the
// student's row: each element is read and written by one thread. Labels were checked on the device before.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>

#include "cuda/launchers.h"
#include "ops.h"

namespace {

constexpr int kThreads = 512;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ void from_float(float x, float* out) { *out = x; }
__device__ void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ void from_float(float x, __half* out) { *out = __float2half_rn(x); }

constexpr int kPack = 4;  // elements a thread handles at once: one 16-byte load of float, 8 bytes of half types
template <class T>
struct alignas(kPack * sizeof(T)) Pack {
  T x[kPack];
};

// The kPack logits from `column` on as float; classes that do not exist are -inf.
template <class T>
__device__ void load_pack(const T* row, int64_t column, int64_t classes, bool aligned, float (&out)[kPack]) {
  if (aligned && column + kPack <= classes) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(row + column);
    for (int i = 0; i < kPack; ++i) out[i] = to_float(pack.x[i]);
  } else {
    for (int i = 0; i < kPack; ++i) out[i] = column + i < classes ? to_float(row[column + i]) : -INFINITY;
  }
}

template <class T>
__device__ void store_pack(T* row, int64_t column, int64_t classes, bool aligned, const float (&in)[kPack]) {
  if (aligned && column + kPack <= classes) {
    Pack<T> pack;
    for (int i = 0; i < kPack; ++i) from_float(in[i], &pack.x[i]);
    *reinterpret_cast<Pack<T>*>(row + column) = pack;
  } else {
    for (int i = 0; i < kPack; ++i)
      if (column + i < classes) from_float(in[i], row + column + i);
  }
}

template <class T>
__device__ bool is_aligned(const T* row) {
  return reinterpret_cast<uintptr_t>(row) % (kPack * sizeof(T)) == 0;
}

// A maximum and sums of exponentials relative to it. It starts as {-INFINITY, 0, 0}.
struct Softmax {
  float maximum, sum, label_sum;
  __device__ float reference() const { return maximum == -INFINITY ? 0.0f : maximum; }
  __device__ void raise(float to, float a) {
    if (!(to > maximum)) return;
    sum *= expf((maximum - to) * a);  // maximum is -inf at first: factor 0
    label_sum *= expf(maximum - to);
    maximum = to;
  }
  __device__ void merge(Softmax other, float a) {
    raise(other.maximum, a);
    if (other.maximum < maximum) {
      other.sum *= expf((other.maximum - maximum) * a);
      other.label_sum *= expf(other.maximum - maximum);
    }
    sum += other.sum;
    label_sum += other.label_sum;
  }
};

__device__ float shuffle(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// Everyone ends with the block's total. `buffer` holds kThreads / 32 values; callers synchronise between uses.
template <class V, class Merge, class Exchange>
__device__ V block_reduce(V value, V* buffer, const Merge& merge, const Exchange& exchange) {
  for (int lanes = 16; lanes > 0; lanes /= 2) merge(&value, exchange(value, lanes));
  __syncthreads();
  if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = value;
  __syncthreads();
  value = buffer[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) merge(&value, buffer[warp]);
  return value;
}

__device__ Softmax reduce(Softmax value, float a, Softmax* buffer) {
  return block_reduce(
      value, buffer, [a](Softmax* x, const Softmax& y) { x->merge(y, a); },
      [](const Softmax& x, int lanes) {
        Softmax y;
        y.maximum = shuffle(x.maximum, lanes);
        y.sum = shuffle(x.sum, lanes);
        y.label_sum = shuffle(x.label_sum, lanes);
        return y;
      });
}

__device__ float reduce_add(float value, float* buffer) {
  return block_reduce(
      value, buffer, [](float* x, float y) { *x += y; }, [](float x, int lanes) { return shuffle(x, lanes); });
}

struct Terms {
  float p, value, slope;  // P, the class's part of the divergence, P * g (forward: P - Q)
};

template <int kDirection>
__device__ Terms terms(float s, float t, float log_p, float log_q, float beta) {
  const float p = s == -INFINITY ? 0.0f : expf(log_p);
  const float q = t == -INFINITY ? 0.0f : expf(log_q);
  if (kDirection == pykd::kForward)
    return {p, t == -INFINITY ? 0.0f : s == -INFINITY ? INFINITY : q * (log_q - log_p), p - q};
  if (kDirection == pykd::kReverse) {
    const float value = s == -INFINITY ? 0.0f : t == -INFINITY ? INFINITY : p * (log_p - log_q);
    return {p, value, value};
  }
  if (kDirection == pykd::kJsd) {
    const float inverse = 1.0f / fmaxf(beta * q + (1 - beta) * p, FLT_MIN);
    const float slope = p * logf(fmaxf(p * inverse, FLT_MIN));
    const float value = beta * q * logf(fmaxf(q * inverse, FLT_MIN)) + (1 - beta) * slope;
    return {p, value, (1 - beta) * slope};
  }
  const float sign = p > q ? 0.5f : p < q ? -0.5f : 0.0f;
  return {p, sign * (p - q), sign * p};
}

template <class S, class T, int kDirection>
__global__ void __launch_bounds__(kThreads) kl_div_kernel(pykd::KlDivArgs args) {
  __shared__ Softmax softmax_buffer[kThreads / 32];
  __shared__ float buffer[kThreads / 32];
  const int64_t row = blockIdx.x;
  const S* student = static_cast<const S*>(args.student) + row * args.student_stride;
  const T* teacher = static_cast<const T*>(args.teacher) + row * args.teacher_stride;
  S* gradient = args.gradient ? static_cast<S*>(args.gradient) + row * args.student_classes : nullptr;
  const int64_t classes = args.student_classes > args.teacher_classes ? args.student_classes : args.teacher_classes;
  const bool s_aligned = is_aligned(student), t_aligned = is_aligned(teacher), g_aligned = is_aligned(gradient);
  const float scale = args.scale[row];
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kPack;
  constexpr int64_t kStep = static_cast<int64_t>(kThreads) * kPack;

  if (scale == 0) {
    if (threadIdx.x == 0) args.losses[row] = 0;
    const float zeros[kPack] = {};
    if (gradient)
      for (int64_t c = first; c < args.student_classes; c += kStep)
        store_pack(gradient, c, args.student_classes, g_aligned, zeros);
    return;
  }

  const float a = static_cast<float>(1.0 / args.temperature), beta = static_cast<float>(args.beta);
  const bool labelled = args.labels && args.ce_weight != 0;
  const int64_t label = labelled ? args.labels[row] : -1;
  const float label_logit = labelled ? to_float(student[label]) : 0;  // read before it may be overwritten
  Softmax of_student{-INFINITY, 0, 0}, of_teacher{-INFINITY, 0, 0};
  float logit_sum = 0;
  for (int64_t c = first; c < classes; c += kStep) {
    float s[kPack], t[kPack];
    load_pack(student, c, args.student_classes, s_aligned, s);
    load_pack(teacher, c, args.teacher_classes, t_aligned, t);
    of_student.raise(fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3])), a);  // fmaxf passes over NaN, the sums do not
    of_teacher.raise(fmaxf(fmaxf(t[0], t[1]), fmaxf(t[2], t[3])), a);
    for (int i = 0; i < kPack; ++i) {
      of_student.sum += expf((s[i] - of_student.reference()) * a);
      of_teacher.sum += expf((t[i] - of_teacher.reference()) * a);
      if (labelled) {
        of_student.label_sum += expf(s[i] - of_student.reference());
        if (c + i < args.student_classes) logit_sum += s[i];
      }
    }
  }
  of_student = reduce(of_student, a, softmax_buffer);
  of_teacher = reduce(of_teacher, a, softmax_buffer);
  if (labelled && args.label_smoothing != 0) logit_sum = reduce_add(logit_sum, buffer);
  const float s0 = of_student.reference(), t0 = of_teacher.reference();
  const float s_log = logf(of_student.sum), t_log = logf(of_teacher.sum);
  const bool s_nothing = of_student.sum == 0, t_nothing = of_teacher.sum == 0;  // every logit is -inf

  float value = 0, slope_sum = 0;
  if (kDirection != pykd::kForward || !gradient) {
    for (int64_t c = first; c < classes; c += kStep) {
      float s[kPack], t[kPack];
      load_pack(student, c, args.student_classes, s_aligned, s);
      load_pack(teacher, c, args.teacher_classes, t_aligned, t);
      for (int i = 0; i < kPack; ++i) {
        const Terms x = terms<kDirection>(s[i], t[i], (s[i] - s0) * a - s_log, (t[i] - t0) * a - t_log, beta);
        value += x.value;
        slope_sum += x.slope;
      }
    }
    value = reduce_add(value, buffer);
    slope_sum = reduce_add(slope_sum, buffer);
  }

  if (gradient) {
    const bool flat = s_nothing || t_nothing || (kDirection == pykd::kReverse && value == INFINITY);
    float kl_factor = scale * static_cast<float>(args.kl_weight) * a;
    if (value != value) kl_factor = value;  // tv's signs would hide a NaN
    const float ce_factor = labelled && !s_nothing ? scale * static_cast<float>(args.ce_weight) : 0;
    const float smoothing = static_cast<float>(args.label_smoothing);
    const float uniform = smoothing / static_cast<float>(args.student_classes);
    const float label_scale = 1.0f / of_student.label_sum;
    for (int64_t c = first; c < classes; c += kStep) {
      float s[kPack], t[kPack], out[kPack];
      load_pack(student, c, args.student_classes, s_aligned, s);
      load_pack(teacher, c, args.teacher_classes, t_aligned, t);
      for (int i = 0; i < kPack; ++i) {
        const Terms x = terms<kDirection>(s[i], t[i], (s[i] - s0) * a - s_log, (t[i] - t0) * a - t_log, beta);
        if (kDirection == pykd::kForward) value += x.value;
        out[i] = flat ? 0.0f : kl_factor * (kDirection == pykd::kForward ? x.slope : x.slope - x.p * slope_sum);
        if (ce_factor != 0) {
          const float target = (c + i == label ? 1 - smoothing : 0.0f) + uniform;
          out[i] += ce_factor * (expf(s[i] - s0) * label_scale - target);
        }
      }
      store_pack(gradient, c, args.student_classes, g_aligned, out);
    }
    if (kDirection == pykd::kForward) value = reduce_add(value, buffer);
  }

  if (threadIdx.x != 0) return;
  if (s_nothing || t_nothing) value = s_nothing && t_nothing ? 0.0f : INFINITY;
  float loss = args.kl_weight != 0 ? static_cast<float>(args.kl_weight) * value : 0.0f;
  if (labelled) {
    const float log_sum = logf(of_student.label_sum) + s0, smoothing = static_cast<float>(args.label_smoothing);
    float entropy = (1 - smoothing) * (log_sum - label_logit);
    if (smoothing != 0) entropy += smoothing * (log_sum - logit_sum / static_cast<float>(args.student_classes));
    loss += static_cast<float>(args.ce_weight) * (s_nothing ? INFINITY : entropy);
  }
  args.losses[row] = scale * loss;
}

template <class S, class T>
void launch(const pykd::KlDivArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.rows));
  if (args.direction == pykd::kForward)
    kl_div_kernel<S, T, pykd::kForward><<<grid, kThreads, 0, stream>>>(args);
  else if (args.direction == pykd::kReverse)
    kl_div_kernel<S, T, pykd::kReverse><<<grid, kThreads, 0, stream>>>(args);
  else if (args.direction == pykd::kJsd)
    kl_div_kernel<S, T, pykd::kJsd><<<grid, kThreads, 0, stream>>>(args);
  else
    kl_div_kernel<S, T, pykd::kTv><<<grid, kThreads, 0, stream>>>(args);
}

template <class S>
void launch_teacher(const pykd::KlDivArgs& args, cudaStream_t stream) {
  if (args.teacher_dtype == pykd::kFloat32)
    launch<S, float>(args, stream);
  else if (args.teacher_dtype == pykd::kBFloat16)
    launch<S, __nv_bfloat16>(args, stream);
  else
    launch<S, __half>(args, stream);
}

}  // namespace

extern "C" int pykd_cuda_kl_div(const void* student, const void* teacher, const int64_t* labels, const float* scale,
                                float* losses, void* gradient, int64_t rows, int64_t student_classes,
                                int64_t teacher_classes, int64_t student_stride, int64_t teacher_stride,
                                int student_dtype, int teacher_dtype, int direction, double beta, double temperature,
                                double kl_weight, double ce_weight, double label_smoothing, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  pykd::KlDivArgs args{};
  args.student = student;
  args.teacher = teacher;
  args.labels = labels;
  args.scale = scale;
  args.losses = losses;
  args.gradient = gradient;
  args.rows = rows;
  args.student_classes = student_classes;
  args.teacher_classes = teacher_classes;
  args.student_stride = student_stride;
  args.teacher_stride = teacher_stride;
  args.student_dtype = student_dtype;
  args.teacher_dtype = teacher_dtype;
  args.direction = direction;
  args.beta = beta;
  args.temperature = temperature;
  args.kl_weight = kl_weight;
  args.ce_weight = ce_weight;
  args.label_smoothing = label_smoothing;
  if (student_dtype == pykd::kFloat32)
    launch_teacher<float>(args, stream);
  else if (student_dtype == pykd::kBFloat16)
    launch_teacher<__nv_bfloat16>(args, stream);
  else
    launch_teacher<__half>(args, stream);
  return cudaGetLastError();
}
