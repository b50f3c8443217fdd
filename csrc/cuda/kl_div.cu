// Distillation losses and their gradient, one block per row of logits: the meaning is that of csrc/cpu/kl_div.cpp, the
// arithmetic that of csrc/cuda/kl_div_device.cuh. Rows that a cluster's shared memory holds go to kl_div_cluster.cu.
//
// Sweep 1 reads both rows from device memory, 16 bytes per load where the student's row is aligned: every thread keeps
// the maxima and sums of what it has seen, and two rounds of shuffles merge them. The gradient takes one more sweep;
// jsd and tv need their sums over P and Q first and take a sweep between. Two blocks of 512 threads and 64 registers
// run on a multiprocessor, so 2 x 108 rows of 32768 classes in half types (28 MB) stay in an A100's 40 MB of L2 and
// the later sweeps do not reach device memory. The gradient may overwrite the student's row: each element is read and
// written by one thread. Labels were checked on the device before.
#include "cuda/kl_div_cluster.h"
#include "cuda/kl_div_device.cuh"
#include "cuda/launchers.h"

namespace pykd::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// A row of logits as float; classes that do not exist are -inf.
template <class T>
struct Reader {
  const T* row;
  int64_t classes;

  template <int kCount>
  __device__ void load(int64_t column, float (&out)[kCount]) const {
    if (is_aligned<kCount>(row) && column + kCount <= classes) {
      load_pack(row + column, out);
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = column + i < classes ? to_float(row[column + i]) : -INFINITY;
  }
};

// A row whose type is known at run time: the teacher's, where it differs from the student's.
struct AnyType {};
template <>
struct Reader<AnyType> {
  const void* row;
  int64_t classes;
  int dtype;

  template <int kCount>
  __device__ void load(int64_t column, float (&out)[kCount]) const {
    if (dtype == kFloat32)
      Reader<float>{static_cast<const float*>(row), classes}.load(column, out);
    else if (dtype == kBFloat16)
      Reader<__nv_bfloat16>{static_cast<const __nv_bfloat16*>(row), classes}.load(column, out);
    else
      Reader<__half>{static_cast<const __half*>(row), classes}.load(column, out);
  }
};

template <class T>
__device__ Reader<T> teacher_row(const KlDivArgs& args, int64_t row) {
  const int64_t first = row * args.teacher_stride;
  if constexpr (std::is_same_v<T, AnyType>) {
    const int64_t bytes = args.teacher_dtype == kFloat32 ? 4 : 2;
    return {static_cast<const char*>(args.teacher) + first * bytes, args.teacher_classes, args.teacher_dtype};
  } else {
    return {static_cast<const T*>(args.teacher) + first, args.teacher_classes};
  }
}

struct Workspace {
  Sums sums[kWarps];
  Mixture mixtures[kWarps];
  double logits[kWarps];
  Sums row;
  Mixture mixture;
  double label_logit;
  Factors factors;
};

template <class S, class T>
struct Rows {
  Reader<S> student;
  Reader<T> teacher;
  int64_t classes;

  template <class Visit>
  __device__ void for_packs(const Visit& visit) const {
    constexpr int kCount = kPack<S>;
    for (int64_t c = static_cast<int64_t>(threadIdx.x) * kCount; c < classes; c += kThreads * kCount) {
      float s[kCount], t[kCount];
      student.load(c, s);
      teacher.load(c, t);
      visit(c, s, t);
    }
  }
};

template <int kCount>
__device__ float pack_max(const float (&x)[kCount]) {
  float result = x[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) result = fmaxf(result, x[i]);  // passes over NaN; the sums do not
  return result;
}

// Sweep 1: a thread's sums, relative to the maxima of what it has seen.
template <class S, class T, int kDirection>
__device__ Sums sum_row(const Rows<S, T>& rows, LabelExp exponentials, float k) {
  Sums sums = no_sums();
  bool missing = false;
  with_label_exp(exponentials, [&](auto label) {
    rows.for_packs([&](int64_t, const auto& s, const auto& t) {
      const float s_max = pack_max(s), t_max = pack_max(t);
      if (s_max > sums.s_max || t_max > sums.t_max)
        rebase<kDirection>(&sums, fmaxf(sums.s_max, s_max), fmaxf(sums.t_max, t_max), k);
#pragma unroll
      for (int i = 0; i < kPack<S>; ++i) missing |= is_missing<kDirection>(s[i], t[i]);
      add_classes<kDirection, label>(&sums, s, t, k);
    });
  });
  sums.missing = missing ? 1.0f : 0.0f;
  return sums;
}

// A thread's share of (1 - smoothing) * the label's logit + smoothing * the mean logit, summed from the first logit.
template <class S>
__device__ double label_logit(const KlDivArgs& args, const S* student, int64_t label) {
  double result = 0;
  if (threadIdx.x == 0 && label >= 0) result = (1 - args.label_smoothing) * to_float(student[label]);
  if (args.label_smoothing == 0) return result;
  const float first = to_float(student[0]), origin = isfinite(first) ? first : 0.0f;
  float distance = 0;
  for (int64_t c = threadIdx.x; c < args.student_classes; c += kThreads) distance += to_float(student[c]) - origin;
  const double share = args.label_smoothing / static_cast<double>(args.student_classes);
  return result + share * distance + (threadIdx.x == 0 ? args.label_smoothing * origin : 0);
}

template <class S, class T, int kDirection>
__device__ void write_gradient(const KlDivArgs& args, const Rows<S, T>& rows, const Factors& f, int64_t label,
                               S* gradient) {
  constexpr int kCount = kPack<S>;
  const bool aligned = is_aligned<kCount>(gradient);
  const bool mine = label >= 0 && label / kCount % kThreads == static_cast<int>(threadIdx.x);
  float s_label[1] = {0}, t_label[1] = {0};  // read before they may be overwritten
  if (mine) {
    rows.student.load(label, s_label);
    rows.teacher.load(label, t_label);
  }
  with_label_exp(label_exp(args), [&](auto kind) {
    rows.for_packs([&](int64_t c, const auto& s, const auto& t) {
      float g[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) g[i] = class_gradient<kDirection, kind>(s[i], t[i], f, f.constant);
      if (aligned && c + kCount <= args.student_classes) {
        store_pack(gradient + c, g);
        return;
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (c + i < args.student_classes) gradient[c + i] = from_float<S>(g[i]);
    });
    // Again by the thread that wrote it, from float: correcting the stored value would lose what rounding took.
    if (mine) {
      const float g = class_gradient<kDirection, kind>(s_label[0], t_label[0], f, f.constant + f.at_label);
      gradient[label] = from_float<S>(g);
    }
  });
}

template <class S, class T, int kDirection>
__global__ void __launch_bounds__(kThreads, 2) kl_div_kernel(const __grid_constant__ KlDivArgs args) {
  __shared__ Workspace workspace;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = blockIdx.x;
  S* gradient = args.gradient ? static_cast<S*>(args.gradient) + row * args.student_classes : nullptr;
  const float scale = args.scale[row];
  if (scale == 0) {
    if (threadIdx.x == 0) args.losses[row] = 0;
    if (gradient)
      for (int64_t c = threadIdx.x; c < args.student_classes; c += kThreads) gradient[c] = from_float<S>(0.0f);
    return;
  }
  const Rows<S, T> rows{{static_cast<const S*>(args.student) + row * args.student_stride, args.student_classes},
                        teacher_row<T>(args, row),
                        max(args.student_classes, args.teacher_classes)};
  const float k = static_cast<float>(1.4426950408889634 / args.temperature);
  const LabelExp exponentials = label_exp(args);
  const int64_t given = exponentials == kNone ? -1 : args.labels[row];
  const int64_t label = given < args.student_classes ? given : -1;

  const Sums sums = merge_lanes<kDirection>(sum_row<S, T, kDirection>(rows, exponentials, k), 32, k);
  const double logit = exponentials == kNone ? 0 : add_lanes(label_logit(args, rows.student.row, label), 32);
  if (lane == 0) {
    workspace.sums[warp] = sums;
    workspace.logits[warp] = logit;
  }
  __syncthreads();
  constexpr bool kMixture = kDirection == kJsd || kDirection == kTv;
  if (warp == 0) {
    const Sums total = merge_lanes<kDirection>(lane < kWarps ? workspace.sums[lane] : no_sums(), kWarps, k);
    const double total_logit = add_lanes(lane < kWarps ? workspace.logits[lane] : 0.0, kWarps);
    if (lane == 0) {
      workspace.row = total;
      workspace.label_logit = total_logit;
      workspace.mixture = {0, 0};
      workspace.factors = kMixture ? probabilities(args, total) : gradient_factors<kDirection>(args, total, {}, scale);
    }
  }
  __syncthreads();

  if (kMixture) {
    const Factors factors = workspace.factors;
    Mixture sum{0, 0};
    rows.for_packs([&](int64_t, const auto& s, const auto& t) { add_mixture<kDirection>(&sum, s, t, factors); });
    sum = {add_lanes(sum.value, 32), add_lanes(sum.slope, 32)};
    if (lane == 0) workspace.mixtures[warp] = sum;
    __syncthreads();
    if (warp == 0) {
      const Mixture part = lane < kWarps ? workspace.mixtures[lane] : Mixture{0, 0};
      const Mixture total{add_lanes(part.value, kWarps), add_lanes(part.slope, kWarps)};
      if (lane == 0) {
        workspace.mixture = total;
        workspace.factors = gradient_factors<kDirection>(args, workspace.row, total, scale);
      }
    }
    __syncthreads();
  }

  if (gradient) write_gradient<S, T, kDirection>(args, rows, workspace.factors, label, gradient);
  if (threadIdx.x == 0)
    args.losses[row] = row_loss<kDirection>(args, workspace.row, workspace.mixture, workspace.label_logit, scale);
}

template <class S, class T>
void launch(const KlDivArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.rows));
  if (args.direction == kForward)
    kl_div_kernel<S, T, kForward><<<grid, kThreads, 0, stream>>>(args);
  else if (args.direction == kReverse)
    kl_div_kernel<S, T, kReverse><<<grid, kThreads, 0, stream>>>(args);
  else if (args.direction == kJsd)
    kl_div_kernel<S, T, kJsd><<<grid, kThreads, 0, stream>>>(args);
  else
    kl_div_kernel<S, T, kTv><<<grid, kThreads, 0, stream>>>(args);
}

template <class S>
void launch_student(const KlDivArgs& args, cudaStream_t stream) {
  if (args.teacher_dtype == args.student_dtype)
    launch<S, S>(args, stream);
  else
    launch<S, AnyType>(args, stream);
}

cudaError_t launch_rows(const KlDivArgs& args, cudaStream_t stream) {
  if (args.rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (args.student_dtype == kFloat32)
    launch_student<float>(args, stream);
  else if (args.student_dtype == kBFloat16)
    launch_student<__nv_bfloat16>(args, stream);
  else
    launch_student<__half>(args, stream);
  return cudaGetLastError();
}

// 10 * major + minor of the current device; reads of cached attributes, no synchronisation.
cudaError_t capability_of_device(int* capability) {
  int device = 0, major = 0, minor = 0;
  cudaError_t failed = cudaGetDevice(&device);
  if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *capability = 10 * major + minor;
  return failed;
}

}  // namespace
}  // namespace pykd::cuda

extern "C" int pykd_cuda_kl_div_blocks(int64_t classes, int student_dtype, int teacher_dtype, int capability) {
  return pykd::cuda::kl_div_cluster_blocks(classes, student_dtype, teacher_dtype, capability);
}

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
  int capability = 0;
  const cudaError_t failed = pykd::cuda::capability_of_device(&capability);
  if (failed != cudaSuccess) return failed;
  const int64_t classes = student_classes > teacher_classes ? student_classes : teacher_classes;
  const int blocks = pykd_cuda_kl_div_blocks(classes, student_dtype, teacher_dtype, capability);
  return blocks ? pykd::cuda::launch_kl_div_cluster(args, blocks, stream) : pykd::cuda::launch_rows(args, stream);
}
