#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {

void linear_4bit(const Linear4bitArgs&) {}

}  // namespace pykd::PYKD_LEVEL
