// Every native CPU entry point of pykd: raw pointers and sizes, checked by the Python layer before they get here.
//
// An op is one struct of arguments here, one function `void op(const OpArgs&)` in csrc/cpu/op.cpp, which is compiled
// once per instruction-set level into the namespace of that level, and one line in PYKD_OPS.
#pragma once

#include <cstdint>

namespace pykd {

// Codes of element types, the same as DTYPE_CODES in pykd/ops/dispatch.py.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Codes of the divergences, the same as DIRECTION_CODES in pykd/ops/kl_div.py.
enum Direction : int { kForward = 0, kReverse = 1, kJsd = 2, kTv = 3 };

// Softmax distillation losses of rows of logits and their gradient: see csrc/cpu/kl_div.cpp.
struct KlDivArgs {
  const void* student;      // [rows, student_classes] of student_dtype, rows student_stride elements apart
  const void* teacher;      // [rows, teacher_classes] of teacher_dtype, rows teacher_stride elements apart
  const int64_t* labels;    // [rows], read where scale is not 0; null without a label term
  const float* scale;       // [rows] factor of a row's loss and gradient; 0 skips the row
  float* losses;            // [rows] out: scale * (kl_weight * divergence + ce_weight * cross entropy)
  void* gradient;           // [rows, student_classes] of student_dtype out, or null; may be the student's memory
  int64_t* failure;         // [1] out: -1, the first row with a label out of range, or -2 when memory is exhausted
  int64_t rows;
  int64_t student_classes, teacher_classes;  // the narrower one is read as padded with -inf
  int64_t student_stride, teacher_stride;    // elements from row to row; the gradient's rows are adjacent
  int student_dtype, teacher_dtype;  // DType
  int direction;                     // Direction
  double beta;                       // jsd: weight of the teacher in the mixture, in (0, 1)
  double temperature;
  double kl_weight, ce_weight;
  double label_smoothing;
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
