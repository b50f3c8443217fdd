// Distillation losses of wide rows, each logit read from device memory once: the meaning is that of
// csrc/cpu/kl_div.cpp, the arithmetic that of csrc/cuda/kl_div_device.cuh.
//
//   cluster of `blocks` thread blocks = one row; block r holds classes [r * width, (r + 1) * width) of both sides
//
//   device memory --bulk copies, 4 stages--> shared memory: student slice | teacher slice | workspace | slots
//   1 maxima, stage by stage as copies land      block reduction (a block's own maxima are its references)
//   2 sums of exponentials, from shared memory   block reduction, then each block writes its sums into its slot of
//                                                every block's shared memory; one cluster barrier; all merge the slots
//   3 jsd and tv: sums over P and Q              the same exchange once more
//   4 gradient from shared memory straight to device memory, in place if asked
//
// Bytes: 2 reads and 1 write of the row, 6 per class in half types; 8192 x 128256 bf16 is 6.3 GB, 2.1 ms at 3 TB/s.
// Operations, forward KL without labels: 30 issue slots a class (1.5 unpacking and maxima, 16 sums, 11 gradient) and 4
// MUFU.EX2, so 1.1 ms of issue and 1.2 ms of MUFU on 132 multiprocessors at 1.7 GHz, to be hidden under those 2.1 ms.
// What hides it are other clusters: blocks of 256 threads, at most 75 KB and 80 registers run three to a
// multiprocessor, so that one computes while two load. Expected: 80 to 85 % of copy bandwidth; jsd, with 11 MUFU
// operations a class, is bound by those at about half.
//
// Cluster barriers: (A) arrive at the start, wait before the first remote write: a block's shared memory may be written
// only once it runs. (B) and (C) end the exchanges. After the last one a block touches only its own shared memory, so
// it may exit at any time. A row of scale 0 is left by the whole cluster before (A).
#include "cuda/kl_div_cluster.h"

#include <cooperative_groups.h>

#include "cuda/kl_div_device.cuh"

namespace pykd::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kStages = 4;
constexpr int kMostBlocks = 16;

struct WarpSums {
  float s_sum, t_sum, label_sum, cross;
  double label_logit;
};

// What one block tells the others.
struct Slot {
  Sums sums;
  Mixture mixture;
  double label_logit;
};

struct Workspace {
  uint64_t landed[kStages];  // mbarriers, each used for one phase
  WarpSums warps[kWarps];
  float2 maxima[kWarps];
  Slot row;  // all slots merged
  Factors factors;
};

// Classes per block: a multiple of 16, so that slices begin at sector boundaries where rows do.
__host__ __device__ int64_t slice_width(int64_t classes, int blocks) { return ((classes - 1) / blocks / 16 + 1) * 16; }

__host__ __device__ int64_t shared_bytes(int64_t classes, int element_bytes, int blocks) {
  const auto slots = static_cast<int64_t>(sizeof(Slot)) * blocks;
  return 2 * slice_width(classes, blocks) * element_bytes + static_cast<int64_t>(sizeof(Workspace)) + slots;
}

// One block's part of a row. Shared memory holds -inf from a side's count up to the last pack.
template <class T>
struct Slice {
  T *student, *teacher;  // in shared memory
  int student_count, teacher_count, packs;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // below, there are no clusters: the kernels are empty
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline int clamp_count(int64_t count, int width) {
  return count < 0 ? 0 : count > width ? width : static_cast<int>(count);
}

// Leading classes of a slice that the bulk copy engine moves: all whole 16 bytes, or none where they do not line up.
template <class T>
__device__ int bulk_count(const T* from, int count) {
  return reinterpret_cast<uintptr_t>(from) % 16 == 0 ? count / kPack<T> * kPack<T> : 0;
}

__device__ inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* landed) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(landed))
               : "memory");
}

// One thread starts every copy of the block; a stage's barrier completes when its bytes have landed.
template <class T>
__device__ void start_copies(const Slice<T>& slice, const T* student, const T* teacher, uint64_t* landed) {
  for (int stage = 0; stage < kStages; ++stage)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(landed + stage)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  const int step = (slice.packs + kStages - 1) / kStages * kPack<T>;
  const int s_bulk = bulk_count(student, slice.student_count), t_bulk = bulk_count(teacher, slice.teacher_count);
  for (int stage = 0; stage < kStages; ++stage) {
    const int begin = stage * step;
    const auto s_bytes = static_cast<uint32_t>(clamp_count(s_bulk - begin, step) * sizeof(T));
    const auto t_bytes = static_cast<uint32_t>(clamp_count(t_bulk - begin, step) * sizeof(T));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(landed + stage)),
                 "r"(s_bytes + t_bytes)
                 : "memory");
    if (s_bytes) bulk_copy(slice.student + begin, student + begin, s_bytes, landed + stage);
    if (t_bytes) bulk_copy(slice.teacher + begin, teacher + begin, t_bytes, landed + stage);
  }
}

__device__ inline void wait_for(uint64_t* landed) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(landed))
        : "memory");
}

// What the copy engine leaves: the classes after the last whole 16 bytes, or the whole slice of a row that does not
// begin at a multiple of 16 bytes; and -inf up to `padded`. Eight independent loads are in flight per thread.
template <class T>
__device__ void copy_rest(T* to, const T* from, int count, int padded) {
  constexpr int kBatch = 8;
  for (int first = bulk_count(from, count) + static_cast<int>(threadIdx.x); first < padded;
       first += kBatch * kThreads) {
    T batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int c = first + i * kThreads;
      batch[i] = c < count ? from[c] : from_float<T>(-INFINITY);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (first + i * kThreads < padded) to[first + i * kThreads] = batch[i];
  }
}

// Maximum and minimum of 32-bit words: one float, or two half types, where a NaN gives way to a number.
template <class T>
__device__ uint32_t word_max(uint32_t a, uint32_t b) {
  uint32_t y;
  if constexpr (std::is_same_v<T, float>)
    asm("max.f32 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  else if constexpr (std::is_same_v<T, __half>)
    asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  else
    asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

template <class T>
__device__ uint32_t word_min(uint32_t a, uint32_t b) {
  uint32_t y;
  if constexpr (std::is_same_v<T, float>)
    asm("min.f32 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  else if constexpr (std::is_same_v<T, __half>)
    asm("min.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  else
    asm("min.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// The word that holds `x` in every place; x is an infinity.
template <class T>
__device__ uint32_t word_of(float x) {
  constexpr int kCount = static_cast<int>(4 / sizeof(T));
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.x[i] = from_float<T>(x);
  return *reinterpret_cast<const uint32_t*>(&pack);
}

template <class T>
__device__ float word_extreme(uint32_t word, bool greatest) {
  constexpr int kCount = static_cast<int>(4 / sizeof(T));
  float x[kCount];
  load_pack(reinterpret_cast<const T*>(&word), x);
  if (kCount == 1) return x[0];
  return greatest ? fmaxf(x[0], x[kCount - 1]) : fminf(x[0], x[kCount - 1]);
}

struct Extremes {
  float s_max, t_max, low;  // low: the least logit of the side that may miss classes (student; reverse: teacher)
};

// Sweep 1, as the stages land.
template <class T, int kDirection>
__device__ Extremes find_extremes(const Slice<T>& slice, Workspace* workspace) {
  const uint4* student = reinterpret_cast<const uint4*>(slice.student);
  const uint4* teacher = reinterpret_cast<const uint4*>(slice.teacher);
  const int step = (slice.packs + kStages - 1) / kStages;
  uint32_t s_max = word_of<T>(-INFINITY), t_max = s_max, low = word_of<T>(INFINITY);
  for (int stage = 0; stage < kStages; ++stage) {
    wait_for(workspace->landed + stage);
    const int end = min((stage + 1) * step, slice.packs);
    for (int pack = stage * step + static_cast<int>(threadIdx.x); pack < end; pack += kThreads) {
      const uint4 s = student[pack], t = teacher[pack];
      s_max = word_max<T>(s_max, word_max<T>(word_max<T>(s.x, s.y), word_max<T>(s.z, s.w)));
      t_max = word_max<T>(t_max, word_max<T>(word_max<T>(t.x, t.y), word_max<T>(t.z, t.w)));
      if (kDirection == kForward) low = word_min<T>(low, word_min<T>(word_min<T>(s.x, s.y), word_min<T>(s.z, s.w)));
      if (kDirection == kReverse) low = word_min<T>(low, word_min<T>(word_min<T>(t.x, t.y), word_min<T>(t.z, t.w)));
    }
  }
  return {word_extreme<T>(s_max, true), word_extreme<T>(t_max, true), word_extreme<T>(low, false)};
}

template <class T, class Visit>
__device__ void for_packs(const Slice<T>& slice, const Visit& visit) {
  for (int pack = threadIdx.x; pack < slice.packs; pack += kThreads) {
    float s[kPack<T>], t[kPack<T>];
    load_pack(slice.student + pack * kPack<T>, s);
    load_pack(slice.teacher + pack * kPack<T>, t);
    visit(pack * kPack<T>, s, t);
  }
}

// Sweep 2: a thread's sums relative to the block's maxima.
template <class T, int kDirection>
__device__ Sums sum_slice(const KlDivArgs& args, const Slice<T>& slice, Workspace* workspace, float k) {
  Extremes own = find_extremes<T, kDirection>(slice, workspace);
  for (int step = 16; step > 0; step /= 2) {
    own.s_max = fmaxf(own.s_max, __shfl_xor_sync(kWarp, own.s_max, step));
    own.t_max = fmaxf(own.t_max, __shfl_xor_sync(kWarp, own.t_max, step));
  }
  if (threadIdx.x % 32 == 0) workspace->maxima[threadIdx.x / 32] = {own.s_max, own.t_max};
  const bool may_miss = __syncthreads_or(own.low == -INFINITY);
  Sums sums = no_sums();
  for (const float2 maxima : workspace->maxima) {
    sums.s_max = fmaxf(sums.s_max, maxima.x);
    sums.t_max = fmaxf(sums.t_max, maxima.y);
  }
  if (may_miss && (kDirection == kForward || kDirection == kReverse)) {  // the same for the whole block
    bool missing = false;
    for_packs(slice, [&](int, const auto& s, const auto& t) {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) missing |= is_missing<kDirection>(s[i], t[i]);
    });
    sums.missing = static_cast<float>(__syncthreads_or(missing) != 0);
  }
  with_label_exp(label_exp(args), [&](auto label) {
    for_packs(slice, [&](int, const auto& s, const auto& t) { add_classes<kDirection, label>(&sums, s, t, k); });
  });
  return sums;
}

// A thread's share of (1 - smoothing) * the label's logit + smoothing * the mean logit. Summed from the block's
// maximum.
template <class T>
__device__ double label_logit(const KlDivArgs& args, const Slice<T>& slice, int label, float s_max) {
  double result = 0;
  if (threadIdx.x == 0 && label >= 0) result = (1 - args.label_smoothing) * to_float(slice.student[label]);
  if (args.label_smoothing == 0) return result;
  const float s0 = reference(s_max);
  float distance = 0;
  int count = 0;
  for (int c = threadIdx.x; c < slice.student_count; c += kThreads, ++count)
    distance += to_float(slice.student[c]) - s0;
  const double share = args.label_smoothing / static_cast<double>(args.student_classes);
  return result + share * (static_cast<double>(distance) + static_cast<double>(count) * s0);
}

// The block's sums and logit, in every lane of warp 0.
__device__ inline Slot reduce_block(Sums sums, double logit, Workspace* workspace) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const WarpSums own{add_lanes(sums.s_sum, 32), add_lanes(sums.t_sum, 32), add_lanes(sums.label_sum, 32),
                     add_lanes(sums.cross, 32), add_lanes(logit, 32)};
  if (lane == 0) workspace->warps[warp] = own;
  __syncthreads();
  if (warp != 0) return {};
  const WarpSums part = lane < kWarps ? workspace->warps[lane] : WarpSums{};
  sums.s_sum = add_lanes(part.s_sum, 32);
  sums.t_sum = add_lanes(part.t_sum, 32);
  sums.label_sum = add_lanes(part.label_sum, 32);
  sums.cross = add_lanes(part.cross, 32);
  return {sums, {}, add_lanes(part.label_logit, 32)};
}

// Sweep 3, jsd and tv: the block's sums, in every lane of warp 0.
template <class T, int kDirection>
__device__ Mixture mix_slice(const Slice<T>& slice, Workspace* workspace) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const Factors factors = workspace->factors;
  Mixture sum{0, 0};
  for_packs(slice, [&](int, const auto& s, const auto& t) { add_mixture<kDirection>(&sum, s, t, factors); });
  sum = {add_lanes(sum.value, 32), add_lanes(sum.slope, 32)};
  if (lane == 0) workspace->maxima[warp] = {sum.value, sum.slope};
  __syncthreads();
  const float2 part = lane < kWarps ? workspace->maxima[lane] : float2{0, 0};
  return {add_lanes(part.x, 32), add_lanes(part.y, 32)};
}

// Sweep 4. `label` is the label's place in the slice, or negative.
template <class T, int kDirection, int kLabel>
__device__ void write_gradient(const Slice<T>& slice, const Factors& f, int label, T* gradient) {
  // A row of the gradient that does not begin at a multiple of 16 bytes is gathered over the student's slice first.
  const bool direct = is_aligned<kPack<T>>(gradient);
  T* out = direct ? gradient : slice.student;
  const bool mine = kLabel != kNone && label >= 0 && label / kPack<T> % kThreads == static_cast<int>(threadIdx.x);
  const float s_label = mine ? to_float(slice.student[label]) : 0, t_label = mine ? to_float(slice.teacher[label]) : 0;
  for_packs(slice, [&](int column, const auto& s, const auto& t) {
    float g[kPack<T>];
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) g[i] = class_gradient<kDirection, kLabel>(s[i], t[i], f, f.constant);
    if (column + kPack<T> <= slice.student_count) {
      store_pack(out + column, g);
      return;
    }
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i)
      if (column + i < slice.student_count) out[column + i] = from_float<T>(g[i]);
  });
  // Again by the thread that wrote it, from float: correcting the stored value would lose what rounding took.
  if (mine)
    out[label] = from_float<T>(class_gradient<kDirection, kLabel>(s_label, t_label, f, f.constant + f.at_label));
  if (direct) return;
  __syncthreads();
  for (int c = threadIdx.x; c < slice.student_count; c += kThreads) gradient[c] = slice.student[c];
}

template <class T>
__device__ void write_zeros(T* gradient, int count) {
  const float zeros[kPack<T>] = {};
  const int whole = is_aligned<kPack<T>>(gradient) ? count / kPack<T> : 0;
  for (int pack = threadIdx.x; pack < whole; pack += kThreads) store_pack(gradient + pack * kPack<T>, zeros);
  for (int c = whole * kPack<T> + static_cast<int>(threadIdx.x); c < count; c += kThreads)
    gradient[c] = from_float<T>(0.0f);
}

template <class T, int kDirection>
__device__ void run_row(const KlDivArgs& args) {
  extern __shared__ __align__(128) unsigned char shared[];
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool first_warp = threadIdx.x < 32;
  const int64_t row = blockIdx.x / static_cast<unsigned>(blocks);
  const int64_t classes = max(args.student_classes, args.teacher_classes);
  const int width = static_cast<int>(slice_width(classes, blocks));
  const int64_t begin = static_cast<int64_t>(rank) * width;
  const T* student = static_cast<const T*>(args.student) + row * args.student_stride + begin;
  const T* teacher = static_cast<const T*>(args.teacher) + row * args.teacher_stride + begin;
  T* gradient = args.gradient ? static_cast<T*>(args.gradient) + row * args.student_classes + begin : nullptr;

  Slice<T> slice;
  slice.student = reinterpret_cast<T*>(shared);
  slice.teacher = slice.student + width;
  slice.student_count = clamp_count(args.student_classes - begin, width);
  slice.teacher_count = clamp_count(args.teacher_classes - begin, width);
  slice.packs = (clamp_count(classes - begin, width) + kPack<T> - 1) / kPack<T>;
  Workspace* workspace = reinterpret_cast<Workspace*>(slice.teacher + width);
  Slot* slots = reinterpret_cast<Slot*>(workspace + 1);

  const float scale = args.scale[row];
  if (scale == 0) {  // for every block of the cluster
    if (gradient) write_zeros(gradient, slice.student_count);
    if (rank == 0 && threadIdx.x == 0) args.losses[row] = 0;
    return;
  }
  cluster.barrier_arrive();  // (A)
  if (threadIdx.x == 0) start_copies(slice, student, teacher, workspace->landed);
  copy_rest(slice.student, student, slice.student_count, slice.packs * kPack<T>);
  copy_rest(slice.teacher, teacher, slice.teacher_count, slice.packs * kPack<T>);
  const LabelExp exponentials = label_exp(args);
  const int64_t place = exponentials == kNone ? -1 : args.labels[row] - begin;
  const int label = place >= 0 && place < slice.student_count ? static_cast<int>(place) : -1;
  __syncthreads();  // the barriers are initialised and what threads copied is there

  const float k = static_cast<float>(1.4426950408889634 / args.temperature);
  const Sums sums = sum_slice<T, kDirection>(args, slice, workspace, k);
  const double logit = exponentials == kNone ? 0 : label_logit(args, slice, label, sums.s_max);
  const Slot own = reduce_block(sums, logit, workspace);
  cluster.barrier_wait();  // (A)
  if (first_warp && lane < blocks) *cluster.map_shared_rank(slots + rank, lane) = own;
  __syncwarp();
  cluster.sync();  // (B)

  constexpr bool kMixture = kDirection == kJsd || kDirection == kTv;
  if (first_warp) {
    const Slot other = lane < blocks ? slots[lane] : Slot{no_sums(), {}, 0};
    const Slot merged{
        merge_lanes<kDirection>(other.sums, kMostBlocks, k), {}, add_lanes(other.label_logit, kMostBlocks)};
    if (lane == 0) {
      workspace->row = merged;
      workspace->factors =
          kMixture ? probabilities(args, merged.sums) : gradient_factors<kDirection>(args, merged.sums, {}, scale);
    }
  }
  __syncthreads();

  if (kMixture) {
    const Mixture mixture = mix_slice<T, kDirection>(slice, workspace);
    if (first_warp && lane < blocks) cluster.map_shared_rank(slots + rank, lane)->mixture = mixture;
    __syncwarp();
    cluster.sync();  // (C)
    if (first_warp) {
      const Mixture other = lane < blocks ? slots[lane].mixture : Mixture{0, 0};
      const Mixture merged{add_lanes(other.value, kMostBlocks), add_lanes(other.slope, kMostBlocks)};
      if (lane == 0) {
        workspace->row.mixture = merged;
        workspace->factors = gradient_factors<kDirection>(args, workspace->row.sums, merged, scale);
      }
    }
    __syncthreads();
  }

  if (gradient) {
    const Factors factors = workspace->factors;
    with_label_exp(exponentials,
                   [&](auto kind) { write_gradient<T, kDirection, kind>(slice, factors, label, gradient); });
  }
  if (rank == 0 && threadIdx.x == 0) {
    const Slot& total = workspace->row;
    args.losses[row] = row_loss<kDirection>(args, total.sums, total.mixture, total.label_logit, scale);
  }
}

#endif

template <class T, int kDirection>
__global__ void __launch_bounds__(kThreads, 3) kl_div_cluster_kernel(const __grid_constant__ KlDivArgs args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  run_row<T, kDirection>(args);
#endif
}

template <class T>
const void* kernel_of(int direction) {
  void (*const kernels[])(KlDivArgs) = {kl_div_cluster_kernel<T, kForward>, kl_div_cluster_kernel<T, kReverse>,
                                        kl_div_cluster_kernel<T, kJsd>, kl_div_cluster_kernel<T, kTv>};
  return reinterpret_cast<const void*>(kernels[direction]);
}

constexpr int kElementBytes[] = {4, 2, 2};  // by DType

}  // namespace

int kl_div_cluster_blocks(int64_t classes, int student_dtype, int teacher_dtype, int capability) {
  constexpr int64_t kFewestClasses = 16384;      // below, one block's second read of a row comes from its caches
  constexpr int64_t kThirdOfShared = 75 * 1024;  // three blocks to a multiprocessor: (228 KB / 3) - 1 KB of the system
  if (capability < 90 || student_dtype != teacher_dtype || classes < kFewestClasses) return 0;
  const bool large = capability < 110;  // compute capability 9 and 10: 227 KB a block, clusters of 16
  const int64_t block_limit = (large ? 227 : 99) * 1024;
  const int most = large ? kMostBlocks : 8;
  for (int blocks = 1; blocks < most; blocks *= 2)
    if (shared_bytes(classes, kElementBytes[student_dtype], blocks) <= kThirdOfShared) return blocks;
  return shared_bytes(classes, kElementBytes[student_dtype], most) <= block_limit ? most : 0;
}

cudaError_t launch_kl_div_cluster(const KlDivArgs& args, int blocks, cudaStream_t stream) {
  const int64_t classes = args.student_classes > args.teacher_classes ? args.student_classes : args.teacher_classes;
  const int64_t bytes = shared_bytes(classes, kElementBytes[args.student_dtype], blocks);
  if (args.rows > INT32_MAX / blocks) return cudaErrorInvalidConfiguration;
  const void* kernel = args.student_dtype == kFloat32    ? kernel_of<float>(args.direction)
                       : args.student_dtype == kBFloat16 ? kernel_of<__nv_bfloat16>(args.direction)
                                                         : kernel_of<__half>(args.direction);
  const struct {
    cudaFuncAttribute attribute;
    int value;
  } settings[] = {{cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)},
                  {cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared},
                  {cudaFuncAttributeNonPortableClusterSizeAllowed, 1}};
  for (const auto& setting : settings) {
    const cudaError_t failed = cudaFuncSetAttribute(kernel, setting.attribute, setting.value);
    if (failed != cudaSuccess) return failed;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(args.rows * blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  KlDivArgs copy = args;
  void* arguments[] = {&copy};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace pykd::cuda
