// Linear layer over a bitmask + values weight: y[m, n] = sum_k x[m, k] W[n, k] + bias[n], sums in fp32.
//
// 1 to 8 rows: one warp a row of W. Each lane owns one byte of the bitmask, 8 columns; a warp scan of the bytes'
// popcounts tells each lane where its values begin, so the warp reads 256 columns of bits and their values, which are
// neighbours in memory, in one go. Traffic is density * sizeof(value) + 1/8 byte a weight. More rows: 64 x 64 output
// tiles. 64 rows of W x 32 columns are expanded into shared memory (one mask byte a thread), then multiplied with 64
// rows of x from registers, 4 x 4 outputs a thread.
#include "cuda/launchers.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

constexpr int kWarps = 8;  // rows of W a block of the first kernel handles
constexpr int kTile = 64;  // rows of W and of x in a block of the second
constexpr int kTileColumns = 32;

struct Args {
  const void* x;           // X [rows, in_features]
  const uint8_t* bitmask;  // [out_features, ceil(in_features / 8)]
  const void* values;      // V [nnz]
  const int64_t* offsets;  // [out_features + 1]
  const float* bias;       // [out_features] or null
  void* y;                 // X [rows, out_features]
  int64_t rows, in_features, out_features;
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <class X, class V, int kRows>
__global__ void __launch_bounds__(kWarps * 32) few_rows(Args args) {
  const int lane = threadIdx.x % 32;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (n >= args.out_features) return;
  const int64_t row_bytes = (args.in_features + 7) / 8;
  const uint8_t* bits = args.bitmask + n * row_bytes;
  const V* value = static_cast<const V*>(args.values) + args.offsets[n];
  const X* x = static_cast<const X*>(args.x);
  float sum[kRows] = {};
  for (int64_t base = 0; base < row_bytes; base += 32) {
    const int64_t byte = base + lane;
    unsigned mask = byte < row_bytes ? bits[byte] : 0u;
    const int own = __popc(mask);
    int end = own;  // inclusive scan over the lanes
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, end, step);
      if (lane >= step) end += before;
    }
    const V* mine = value + (end - own);
    for (; mask != 0; mask &= mask - 1) {
      const int64_t k = byte * 8 + __ffs(mask) - 1;
      const float w = to_float(*mine++);
#pragma unroll
      for (int m = 0; m < kRows; ++m) sum[m] += w * to_float(x[m * args.in_features + k]);
    }
    value += __shfl_sync(0xffffffffu, end, 31);
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    for (int step = 16; step > 0; step /= 2) sum[m] += __shfl_down_sync(0xffffffffu, sum[m], step);
    if (lane == 0)
      static_cast<X*>(args.y)[m * args.out_features + n] = from_float<X>(sum[m] + (args.bias ? args.bias[n] : 0.0f));
  }
}

template <class X, class V>
__global__ void __launch_bounds__(256) many_rows(Args args) {
  __shared__ float w_tile[kTileColumns][kTile + 1];  // + 1: a column's elements lie in different banks
  __shared__ float x_tile[kTileColumns][kTile + 1];
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t row_bytes = (args.in_features + 7) / 8;
  const X* x = static_cast<const X*>(args.x);
  // Expanding: thread t has mask byte t % 4 of row t / 4 of the tile.
  const int row = threadIdx.x / 4, part = threadIdx.x % 4;
  const bool inside = n0 + row < args.out_features;
  const uint8_t* bits = args.bitmask + (n0 + row) * row_bytes;
  const V* value = static_cast<const V*>(args.values) + (inside ? args.offsets[n0 + row] : 0);
  // Multiplying: thread t has 4 x 4 outputs.
  const int tn = threadIdx.x % 16 * 4, tm = threadIdx.x / 16 * 4;
  float sum[4][4] = {};
  for (int64_t k0 = 0; k0 < args.in_features; k0 += kTileColumns) {
    const int64_t byte = k0 / 8 + part;
    const unsigned mask = inside && byte < row_bytes ? bits[byte] : 0u;
    int end = __popc(mask);  // inclusive scan over the four threads of a row
    for (int step = 1; step < 4; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, end, step, 4);
      if (part >= step) end += before;
    }
    const V* mine = value + (end - __popc(mask));
    for (int bit = 0; bit < 8; ++bit) w_tile[part * 8 + bit][row] = mask >> bit & 1 ? to_float(*mine++) : 0.0f;
    value += __shfl_sync(0xffffffffu, end, 3, 4);
    for (int i = threadIdx.x; i < kTile * kTileColumns; i += 256) {
      const int64_t k = k0 + i % kTileColumns, m = m0 + i / kTileColumns;
      const bool valid = k < args.in_features && m < args.rows;
      x_tile[i % kTileColumns][i / kTileColumns] = valid ? to_float(x[m * args.in_features + k]) : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < kTileColumns; ++k) {
      float w[4], v[4];
      for (int i = 0; i < 4; ++i) w[i] = w_tile[k][tn + i];
      for (int i = 0; i < 4; ++i) v[i] = x_tile[k][tm + i];
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) sum[i][j] += v[i] * w[j];
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const int64_t m = m0 + tm + i, n = n0 + tn + j;
      if (m < args.rows && n < args.out_features)
        static_cast<X*>(args.y)[m * args.out_features + n] =
            from_float<X>(sum[i][j] + (args.bias ? args.bias[n] : 0.0f));
    }
}

template <class X, class V>
void launch(const Args& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((args.out_features + kWarps - 1) / kWarps);
  const auto few = [&](auto kernel) { kernel<<<blocks, kWarps * 32, 0, stream>>>(args); };
  switch (args.rows) {
    case 1:
      return few(few_rows<X, V, 1>);
    case 2:
      return few(few_rows<X, V, 2>);
    case 3:
      return few(few_rows<X, V, 3>);
    case 4:
      return few(few_rows<X, V, 4>);
    case 5:
      return few(few_rows<X, V, 5>);
    case 6:
      return few(few_rows<X, V, 6>);
    case 7:
      return few(few_rows<X, V, 7>);
    case 8:
      return few(few_rows<X, V, 8>);
  }
  // A grid has at most 65,535 blocks in y: longer inputs go in several launches.
  constexpr int64_t kRowsPerLaunch = int64_t{65535} * kTile;
  for (int64_t row = 0; row < args.rows; row += kRowsPerLaunch) {
    Args part = args;
    part.x = static_cast<const X*>(args.x) + row * args.in_features;
    part.y = static_cast<X*>(args.y) + row * args.out_features;
    part.rows = args.rows - row < kRowsPerLaunch ? args.rows - row : kRowsPerLaunch;
    const dim3 grid(static_cast<unsigned>((args.out_features + kTile - 1) / kTile),
                    static_cast<unsigned>((part.rows + kTile - 1) / kTile));
    many_rows<X, V><<<grid, 256, 0, stream>>>(part);
  }
}

template <class X>
void launch_values(const Args& args, int value_dtype, cudaStream_t stream) {
  if (value_dtype == 0) return launch<X, float>(args, stream);
  if (value_dtype == 1) return launch<X, __nv_bfloat16>(args, stream);
  launch<X, __half>(args, stream);
}

}  // namespace

extern "C" int pykd_cuda_sparse_linear(const void* x, const uint8_t* bitmask, const void* values,
                                       const int64_t* offsets, const float* bias, void* y, int64_t rows,
                                       int64_t in_features, int64_t out_features, int x_dtype, int value_dtype,
                                       cudaStream_t stream) {
  const Args args = {x, bitmask, values, offsets, bias, y, rows, in_features, out_features};
  if (x_dtype == 0)
    launch_values<float>(args, value_dtype, stream);
  else if (x_dtype == 1)
    launch_values<__nv_bfloat16>(args, value_dtype, stream);
  else
    launch_values<__half>(args, value_dtype, stream);
  return static_cast<int>(cudaGetLastError());
}
