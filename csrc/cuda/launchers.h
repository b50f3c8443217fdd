// Every CUDA entry point of pykd, with C linkage, for ctypes: device pointers, sizes and a stream in; a cudaError_t
// out, as int. Nothing here allocates or synchronises.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

extern "C" {
}
