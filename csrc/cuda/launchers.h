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

// csrc/cuda/linear_4bit.cu. Canonical layout; scales fp16, bias float32 or null; code and dtype as in csrc/ops.h.
int pykd_cuda_linear_4bit(const void* x, int64_t x_stride, const void* qweight, const void* scales, const void* zeros,
                          const void* codebook, const void* bias, void* y, int64_t rows, int64_t in_features,
                          int64_t out_features, int64_t group_size, int code, int dtype, cudaStream_t stream);

// Distillation losses of rows of logits and their gradient: the arguments of KlDivArgs in csrc/ops.h, on the device.
int pykd_cuda_kl_div(const void* student, const void* teacher, const int64_t* labels, const float* scale, float* losses,
                     void* gradient, int64_t rows, int64_t student_classes, int64_t teacher_classes,
                     int64_t student_stride, int64_t teacher_stride, int student_dtype, int teacher_dtype,
                     int direction, double beta, double temperature, double kl_weight, double ce_weight,
                     double label_smoothing, cudaStream_t stream);

// Which kernel pykd_cuda_kl_div runs, without touching a device: the thread blocks of the cluster that keeps a row of
// max(student_classes, teacher_classes) in shared memory, or 0 for one block per row. capability = 10 * major + minor.
int pykd_cuda_kl_div_blocks(int64_t classes, int student_dtype, int teacher_dtype, int capability);
}
