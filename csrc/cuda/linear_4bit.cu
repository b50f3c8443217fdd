// y = x W^T + bias over a canonical 4-bit weight (pykd/ops/int4_r16.py).
//
// gemv: 1-8 rows. A warp computes one output for all rows: its lanes read 4 bytes (8 codes) each, neighbours next to
// each other, so that a row of codes streams through once, and meet 8 activations of every row read as 16-byte loads;
// sums meet in registers. A codebook sits in shared memory
// once per bank: 16 entries x 32 lanes, no conflicts whatever the codes are. gemm: more rows. 64 x 64 outputs per block
// of 256 threads, 4 x 4 each; weights are decoded into shared memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launchers.h"

namespace {

constexpr int kWarp = 32, kWarps = 8, kTile = 64, kDepth = 16;

enum Kind { kSymmetric = 0, kAsymmetric = 1, kTable = 2 };

struct Weight {
  const uint8_t* codes;   // [out, ceil(in / 2)]
  const __half* scales;   // [out, groups]
  const uint8_t* zeros;   // [out, ceil(groups / 2)], kAsymmetric only
  const float* codebook;  // [16], kTable only
  int64_t in, out, group, groups;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// Scale and zero point of group g of output n.
template <int kind>
__device__ __forceinline__ float2 scale_and_zero(const Weight& w, int64_t n, int64_t g) {
  const float scale = __half2float(w.scales[n * w.groups + g]);
  float zero = 8.0f;
  if (kind == kAsymmetric) zero = (w.zeros[n * ((w.groups + 1) / 2) + g / 2] >> (g % 2 * 4)) & 15;
  return make_float2(scale, zero);
}

template <int kind>
__device__ __forceinline__ float decode(uint32_t code, float2 sz, const float* table, int lane) {
  return (kind == kTable ? table[code * kWarp + lane] : static_cast<float>(code) - sz.y) * sz.x;
}

__device__ __forceinline__ void fill_table(const float* codebook, float* table) {
  for (int i = threadIdx.x; i < 16 * kWarp; i += blockDim.x) table[i] = codebook[i / kWarp];
  __syncthreads();
}

template <class T, int kind, int Rows>
__global__ void gemv(const T* __restrict__ x, int64_t x_stride, Weight w, const float* __restrict__ bias,
                     T* __restrict__ y, bool eights) {
  __shared__ float table[kind == kTable ? 16 * kWarp : 1];
  if (kind == kTable) fill_table(w.codebook, table);
  const int lane = threadIdx.x % kWarp;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (n >= w.out) return;
  const int64_t pitch = (w.in + 1) / 2;
  const uint8_t* codes = w.codes + n * pitch;
  float sum[Rows] = {};
  if (eights) {
#pragma unroll 4
    for (int64_t k = lane * 8; k < w.in; k += kWarp * 8) {
      const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(codes + k / 2));
      const float2 sz = scale_and_zero<kind>(w, n, k / w.group);
      float value[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = decode<kind>((word >> (i * 4)) & 15, sz, table, lane);
#pragma unroll
      for (int m = 0; m < Rows; ++m) {
        alignas(16) T part[8];
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(part) / 16); ++i)
          reinterpret_cast<uint4*>(part)[i] = __ldg(reinterpret_cast<const uint4*>(x + m * x_stride + k) + i);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[m] += value[i] * to_float(part[i]);
      }
    }
  } else {
    for (int64_t k = lane; k < w.in; k += kWarp) {
      const float2 sz = scale_and_zero<kind>(w, n, k / w.group);
      const float value = decode<kind>((codes[k / 2] >> (k % 2 * 4)) & 15, sz, table, lane);
#pragma unroll
      for (int m = 0; m < Rows; ++m) sum[m] += value * to_float(x[m * x_stride + k]);
    }
  }
#pragma unroll
  for (int m = 0; m < Rows; ++m) {
    for (int step = kWarp / 2; step > 0; step /= 2) sum[m] += __shfl_xor_sync(0xffffffffu, sum[m], step);
    if (lane == 0) y[m * w.out + n] = from_float<T>(sum[m] + (bias ? bias[n] : 0.0f));
  }
}

template <class T, int kind>
__global__ void gemm(const T* __restrict__ x, int64_t x_stride, int64_t rows, Weight w, const float* __restrict__ bias,
                     T* __restrict__ y) {
  __shared__ float table[kind == kTable ? 16 * kWarp : 1];
  __shared__ float xs[kDepth][kTile + 1], ws[kDepth][kTile + 1];
  if (kind == kTable) fill_table(w.codebook, table);
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * kTile, n0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int row = threadIdx.x / 16, column = threadIdx.x % 16;
  const int64_t pitch = (w.in + 1) / 2;
  float sum[4][4] = {};
  for (int64_t k0 = 0; k0 < w.in; k0 += kDepth) {
    for (int i = threadIdx.x; i < kDepth * kTile; i += blockDim.x) {
      const int64_t k = k0 + i % kDepth, m = m0 + i / kDepth, n = n0 + i / kDepth;
      float value = 0.0f;
      if (k < w.in && n < w.out) {
        const float2 sz = scale_and_zero<kind>(w, n, k / w.group);
        value = decode<kind>((w.codes[n * pitch + k / 2] >> (k % 2 * 4)) & 15, sz, table, threadIdx.x % kWarp);
      }
      ws[i % kDepth][i / kDepth] = value;
      xs[i % kDepth][i / kDepth] = k < w.in && m < rows ? to_float(x[m * x_stride + k]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += xs[k][row + 16 * i] * ws[k][column + 16 * j];
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const int64_t m = m0 + row + 16 * i, n = n0 + column + 16 * j;
      if (m < rows && n < w.out) y[m * w.out + n] = from_float<T>(sum[i][j] + (bias ? bias[n] : 0.0f));
    }
}

template <class T, int kind, int Rows = 8>
void launch(const T* x, int64_t x_stride, int64_t rows, const Weight& w, const float* bias, T* y, cudaStream_t stream) {
  if (rows > 8) {
    const dim3 grid(static_cast<unsigned>((w.out + kTile - 1) / kTile),
                    static_cast<unsigned>((rows + kTile - 1) / kTile));
    gemm<T, kind><<<grid, 256, 0, stream>>>(x, x_stride, rows, w, bias, y);
    return;
  }
  if constexpr (Rows > 1) {
    if (rows < Rows) return launch<T, kind, Rows - 1>(x, x_stride, rows, w, bias, y, stream);
  }
  const unsigned blocks = static_cast<unsigned>((w.out + kWarps - 1) / kWarps);
  // Eight codes and eight activations a load, where every one of them is aligned and in one group.
  const bool eights = w.in % 8 == 0 && w.group % 8 == 0 && reinterpret_cast<uintptr_t>(w.codes) % 4 == 0 &&
                      reinterpret_cast<uintptr_t>(x) % 16 == 0 && x_stride * sizeof(T) % 16 == 0;
  gemv<T, kind, Rows><<<blocks, kWarp * kWarps, 0, stream>>>(x, x_stride, w, bias, y, eights);
}

template <class T>
int run(const void* x, int64_t x_stride, int64_t rows, const Weight& w, int kind, const float* bias, void* y,
        cudaStream_t stream) {
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(y);
  if (kind == kSymmetric)
    launch<T, kSymmetric>(from, x_stride, rows, w, bias, to, stream);
  else if (kind == kAsymmetric)
    launch<T, kAsymmetric>(from, x_stride, rows, w, bias, to, stream);
  else
    launch<T, kTable>(from, x_stride, rows, w, bias, to, stream);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

extern "C" int pykd_cuda_linear_4bit(const void* x, int64_t x_stride, const void* qweight, const void* scales,
                                     const void* zeros, const void* codebook, const void* bias, void* y, int64_t rows,
                                     int64_t in_features, int64_t out_features, int64_t group_size, int code, int dtype,
                                     cudaStream_t stream) {
  if (rows == 0 || out_features == 0) return 0;
  const int64_t group = group_size < in_features ? group_size : in_features;
  const Weight w{static_cast<const uint8_t*>(qweight),
                 static_cast<const __half*>(scales),
                 static_cast<const uint8_t*>(zeros),
                 static_cast<const float*>(codebook),
                 in_features,
                 out_features,
                 group,
                 (in_features + group - 1) / group};
  const float* b = static_cast<const float*>(bias);
  if (dtype == 0) return run<float>(x, x_stride, rows, w, code, b, y, stream);
  if (dtype == 1) return run<__nv_bfloat16>(x, x_stride, rows, w, code, b, y, stream);
  return run<__half>(x, x_stride, rows, w, code, b, y, stream);
}
