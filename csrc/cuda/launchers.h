// Every CUDA entry point of pykd, with C linkage, for ctypes: device pointers, sizes and a stream in; a cudaError_t
// out, as int. Nothing here allocates or synchronises.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

extern "C" {

// csrc/cuda/sparse_linear.cu. dtypes as in csrc/ops.h; rows, in_features and out_features are at least 1.
int pykd_cuda_sparse_linear(const void* x, const uint8_t* bitmask, const void* values, const int64_t* offsets,
                            const float* bias, void* y, int64_t rows, int64_t in_features, int64_t out_features,
                            int x_dtype, int value_dtype, cudaStream_t stream);
}
