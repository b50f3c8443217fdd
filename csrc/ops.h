// Every native CPU entry point of pykd: raw pointers and sizes, checked by the Python layer before they get here.
//
// An op is one struct of arguments here, one function `void op(const OpArgs&)` in csrc/cpu/op.cpp, which is compiled
// once per instruction-set level into the namespace of that level, and one line in PYKD_OPS.
#pragma once

#include <cstdint>

namespace pykd {

// Codes of element types, the same as DTYPE_CODES in pykd/ops/dispatch.py.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Softmax distillation losses of rows of logits: see csrc/cpu/kl_div.cpp.
struct KlDivArgs {
  int threads;
};

// Linear layer over a packed 4-bit weight: see csrc/cpu/linear_4bit.cpp.
struct Linear4bitArgs {
  int threads;
};

// Linear layer over a bitmask-packed sparse weight: see csrc/cpu/sparse_linear.cpp.
struct SparseLinearArgs {
  int threads;
};

// X(op, arguments)
#define PYKD_OPS(X)            \
  X(kl_div, KlDivArgs)         \
  X(linear_4bit, Linear4bitArgs) \
  X(sparse_linear, SparseLinearArgs)

#define PYKD_DECLARE(op, Args) void op(const Args& args);
namespace scalar {
PYKD_OPS(PYKD_DECLARE)
}
namespace avx2 {
PYKD_OPS(PYKD_DECLARE)
}
namespace avx512 {
PYKD_OPS(PYKD_DECLARE)
}
#undef PYKD_DECLARE

}  // namespace pykd
