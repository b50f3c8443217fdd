#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {

void sparse_linear(const SparseLinearArgs&) {}

}  // namespace pykd::PYKD_LEVEL
