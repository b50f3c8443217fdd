// The vector verbs of csrc/cpu/vec.h over arrays, the same for every instruction-set level: verbs.cpp is compiled once
// per level, as the kernels are.
#pragma once

#include <cstdint>

namespace pykd {

enum class Unary { kCopy, kExp, kRoundEven, kGelu, kGeluTanh, kSilu, kRelu };
enum class Binary {
  kAdd,
  kSub,
  kMul,
  kDiv,
  kFma,
  kFnma,
  kMin,
  kMax,
  kSelectLess,
  kSelectEqual,
  kScaleByPower,
  kLogQuotient
};

struct Verbs {
  int width;
  void (*unary)(Unary verb, const float* x, int64_t count, float* y);
  void (*binary)(Binary verb, const float* a, const float* b, int64_t count, float* y);  // fma, fnma: a * b +- a
  void (*scaled_exp)(double scale, const float* x, int64_t count, float* y);
  void (*widen)(int dtype, const uint16_t* x, int64_t count, float* y);
  void (*narrow)(int dtype, const float* x, int64_t count, uint16_t* y);
  float (*reduce_add)(const float* x);  // of width elements
  float (*reduce_max)(const float* x);
  void (*transpose)(const float* x, float* y);  // width x width
};

namespace scalar {
Verbs verbs();
}
namespace avx2 {
Verbs verbs();
}
namespace avx512 {
Verbs verbs();
}
namespace avx512_bf16 {
Verbs verbs();
}

}  // namespace pykd
