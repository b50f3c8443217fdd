// The distillation loss of wide rows on clusters of thread blocks: csrc/cuda/kl_div_cluster.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops.h"

namespace pykd::cuda {

// Blocks (1, 2, 4, 8, 16) that hold one row of both logits in their shared memory, or 0 where the kernel cannot or
// should not run. A function of its arguments alone; `capability` is 10 * major + minor.
int kl_div_cluster_blocks(int64_t classes, int student_dtype, int teacher_dtype, int capability);

// Launches the kernel with that many blocks per row.
cudaError_t launch_kl_div_cluster(const KlDivArgs& args, int blocks, cudaStream_t stream);

}  // namespace pykd::cuda
