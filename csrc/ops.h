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
  const void* student;    // [rows, student_classes] of student_dtype, rows student_stride elements apart
  const void* teacher;    // [rows, teacher_classes] of teacher_dtype, rows teacher_stride elements apart
  const int64_t* labels;  // [rows], read where scale is not 0; null without a label term
  const float* scale;     // [rows] factor of a row's loss and gradient; 0 skips the row
  float* losses;          // [rows] out: scale * (kl_weight * divergence + ce_weight * cross entropy)
  void* gradient;         // [rows, student_classes] of student_dtype out, or null; may be the student's memory
  int64_t* failure;       // [1] out: -1, the first row with a label out of range, or -2 when memory is exhausted
  int64_t rows;
  int64_t student_classes, teacher_classes;  // the narrower one is read as padded with -inf
  int64_t student_stride, teacher_stride;    // elements from row to row; the gradient's rows are adjacent
  int student_dtype, teacher_dtype;          // DType
  int direction;                             // Direction
  double beta;                               // jsd: weight of the teacher in the mixture, in (0, 1)
  double temperature;
  double kl_weight, ce_weight;
  double label_smoothing;
  int threads;
};

// The same for a teacher of which some classes were kept: see csrc/cpu/kl_div_topk.cpp.
struct KlDivTopkArgs {
  const void* student;    // [rows, classes] of student_dtype, rows student_stride elements apart
  const int64_t* ids;     // [rows, kept] in [0, classes), in any order, repeated or not; -1 is no entry
  const void* log_probs;  // [rows, kept] of teacher_dtype: logarithms of the weights w
  const int64_t* labels;  // [rows], read where scale is not 0; null without a label term
  const float* scale;     // [rows] factor of a row's loss and gradient; 0 skips the row
  float* losses;          // [rows] out: scale * (kl_weight * divergence + ce_weight * cross entropy)
  void* gradient;         // [rows, classes] of student_dtype out, or null; may be the student's memory
  int64_t* failure;       // [1] out: -1, the first row with a label out of range, rows + the first row with an id
                          // out of range, or -2 when memory is exhausted
  int64_t rows, classes, kept;
  int64_t student_stride;            // elements from row to row; the gradient's rows are adjacent
  int student_dtype, teacher_dtype;  // DType
  int tail;                          // 1: the classes that are not kept are one more class, of weight max(0, 1 - sum w)
  double temperature;                // of the student
  double power;                      // the target is w^power with the sum of w; 1 with `tail`
  double kl_weight, ce_weight;
  double label_smoothing;
  int threads;
};

// Codes of activation functions, the same as ACTIVATIONS in pykd/ops/activation.py.
enum Activation : int { kNoActivation = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3, kRelu = 4 };

// Linear layers that need no more scratch than this many float32 take it from their stack: then `scratch` may be null.
constexpr int64_t kSmallScratch = 4096;

// 4-bit codes, the same as CODES in pykd/ops/int4_r16.py.
enum Code4 : int { kInt4 = 0, kUint4 = 1, kCodebook4 = 2 };

// Rows of activations that are packed at a time: linear_4bit's scratch holds this many (or all, if fewer).
constexpr int64_t kLinear4bitRows = 384;

// linear_4bit_rounded adds integers over at least so many k of a group before it multiplies them by scales: folds are
// padded k / kLinear4bitFold, rounded up, in each group.
constexpr int64_t kLinear4bitFold = 64;

// Linear layer over a packed 4-bit weight: see csrc/cpu/linear_4bit.cpp, and csrc/cpu/linear_4bit_rounded.cpp with
// activations rounded to int8 (not for kCodebook4).
struct Linear4bitArgs {
  const void* x;          // [rows, in_features] of dtype; the last dimension is contiguous
  int64_t x_stride;       // elements from one row of x to the next
  const uint8_t* packed;  // layout int4_r16
  const float* codebook;  // [16] float32 for kCodebook4, else null
  const void* bias;       // [out_features] of bias_dtype, or null
  void* y;                // [rows, out_features] of dtype, contiguous
  float* scratch;         // [n, padded_k], rounded: [n, padded_k / 4 + 3 * folds], n = min(rows, kLinear4bitRows)
  int64_t rows, in_features, out_features, group_size;
  int code;               // Code4
  int wide_scales;        // 1: the layout holds float32 scales, 0: float16
  int activation;         // Activation, of the result
  int dtype, bias_dtype;  // DType
  int threads;
};

// Rows of activations that are packed at a time by linear_8bit.
constexpr int64_t kLinear8bitRows = 384;

// Up to so many inputs a sum of products of int8 codes fits in 32 bits: 127 * 128 * 131072 < 2^31.
constexpr int64_t kLinear8bitFeatures = 131072;

// Linear layer over a packed int8 weight: see csrc/cpu/linear_8bit.cpp.
struct Linear8bitArgs {
  const void* x;          // [rows, in_features] of dtype; the last dimension is contiguous
  int64_t x_stride;       // elements from one row of x to the next
  const uint8_t* packed;  // layout int8_r16
  const void* bias;       // [out_features] of bias_dtype, or null
  void* y;                // [rows, out_features] of dtype, contiguous
  float* scratch;         // with n = min(rows, kLinear8bitRows), k = in_features rounded up to a multiple of 4: float32
                          // [n, 1 + k / 4] where activations are rounded, else [n, k]
  int64_t rows, in_features, out_features;  // in_features at most kLinear8bitFeatures
  int rounds;             // 1: activations are rounded to int8 with a scale per row (w8a8); 0: they are kept (w8a16)
  int activation;         // Activation, of the result
  int dtype, bias_dtype;  // DType
  int threads;
  float input_scale;  // with `rounds`: the scale of every activation; 0: each row's own, largest magnitude / 127
  int input_zero;     // with input_scale: x = input_scale * (code - input_zero); in -127..127
  int rounded;        // 1: scratch still holds what the call before rounded, of the same x and input_scale and at most
                      // kLinear8bitRows rows
};

// Attention of every token of a text to all tokens of it: see csrc/cpu/attention.cpp.
struct AttentionArgs {
  const float *q, *k, *v;                // fp32 [batch * length, heads * dim], rows some elements apart
  int64_t q_stride, k_stride, v_stride;  // elements from row to row
  const float* bias;                     // fp32 [batch, length] added to all scores of a key, or null
  float* y;                              // fp32 [batch * length, heads * dim], contiguous
  float* scratch;                        // fp32 [threads, attention_scratch(length, dim)]
  int64_t batch, length, heads, dim;
  float scale;  // of the products of queries and keys
  int threads;
};

// Floats of scratch that a thread of `attention` needs, at every level: keys and values of a head in whole vectors of
// at most 16, the bias, and scores and products of up to 6 queries.
constexpr int64_t attention_scratch(int64_t length, int64_t dim) {
  return (dim + 7) * ((length + 15) / 16 * 16) + (length + 6) * ((dim + 15) / 16 * 16);
}

// Layer normalisation of x + residual: see csrc/cpu/add_norm.cpp.
struct AddNormArgs {
  const float *x, *residual;   // fp32 [rows, size], contiguous
  const float *weight, *bias;  // fp32 [size]
  float* y;                    // fp32 [rows, size], contiguous; may be neither x nor residual
  int64_t rows, size;
  float eps;
  int threads;
};

// A linear layer of encoder_layer_8bit; the fields are those of Linear8bitArgs.
struct Packed8bit {
  const uint8_t* packed;
  const void* bias;
  int64_t in_features, out_features;
  int bias_dtype, activation;
  float input_scale;
  int input_zero;
};

// A post-norm transformer encoder layer of w8a8 linear layers: see csrc/cpu/encoder_layer_8bit.cpp.
struct EncoderLayer8bitArgs {
  const float* x;     // fp32 [batch * length, hidden], contiguous
  const float* bias;  // fp32 [batch, length] added to all scores of a key, or null
  float* y;           // fp32 [batch * length, hidden], contiguous; not x
  float* scratch;     // fp32 [encoder_layer_8bit_scratch(...)]
  Packed8bit query, key, value, mix, up, down;
  const float *norm_weight[2], *norm_bias[2];  // fp32 [hidden], after attention and after the feed-forward half
  float eps[2];
  int64_t batch, length, hidden, heads, dim, neurons;
  float scale;
  int threads;
};

// Floats of scratch for encoder_layer_8bit: what lies between its steps, then the largest scratch of a step.
constexpr int64_t encoder_layer_8bit_scratch(int64_t batch, int64_t length, int64_t hidden, int64_t heads, int64_t dim,
                                             int64_t neurons, int threads) {
  const int64_t rows = batch * length, width = heads * dim;
  const int64_t first = 4 * width > neurons ? 4 * width : neurons;
  const int64_t half = width > neurons ? width : neurons, inputs = half > hidden ? half : hidden;
  const int64_t linear = (rows < kLinear8bitRows ? rows : kLinear8bitRows) * (1 + (inputs + 3) / 4);
  const int64_t looking = threads * attention_scratch(length, dim);
  return rows * (first + 2 * hidden) + (linear > looking ? linear : looking);
}

// y = x W^T + bias for 1 to 4 rows, W read as bitmask + values and expanded on the way: see csrc/cpu/sparse_linear.cpp.
struct SparseLinearArgs {
  const float* x;          // fp32 [rows, x_stride]; columns from in_features up to a multiple of 16 are 0
  const uint8_t* bitmask;  // uint8 [out_features, ceil(in_features / 8)], bit k % 8 of byte k / 8 is column k
  const void* values;      // value_dtype [nnz], row-major
  const int64_t* offsets;  // int64 [out_features + 1], index of each row's first value
  const void* tail;        // value_dtype: the values from row tail_row on, with 16 readable elements after them
  const float* bias;       // fp32 [out_features] or null
  float* y;                // fp32 [rows, out_features]
  int64_t rows, in_features, out_features, x_stride;
  int64_t tail_row;  // rows before it have 16 readable elements after their last value in `values`
  int value_dtype;   // DType
  int threads;
};

// y = x W^T + bias with W packed by csrc/cpu/sparse_pack.cpp for many rows: see csrc/cpu/sparse_panels.cpp.
struct SparsePanelsArgs {
  const float* x;       // fp32 [rows, x_stride]
  const uint8_t* pack;  // the bytes that sparse_panels_pack wrote
  const float* bias;    // fp32 [out_features] or null
  float* scratch;       // fp32 [sparse_panels_scratch(rows, in_features, tile, threads)]
  float* y;             // fp32 [rows, out_features]
  int64_t rows, in_features, out_features, x_stride;
  int threads;
};

// y = activation(x W^T + bias) with an int8 W packed by csrc/cpu/sparse_pack.cpp as kCodes, x rounded to int8 with a
// scale per row: see csrc/cpu/sparse_8bit.cpp.
struct Sparse8bitArgs {
  const void* x;                            // [rows, in_features] of dtype; the last dimension is contiguous
  int64_t x_stride;                         // elements from one row of x to the next
  const uint8_t* pack;                      // the bytes that sparse_panels_pack wrote
  const float* scales;                      // fp32 [out_features]
  const void* bias;                         // [out_features] of bias_dtype, or null
  void* y;                                  // [rows, out_features] of dtype, contiguous
  float* scratch;                           // fp32 [sparse_8bit_scratch(rows, in_features, tile, threads)]
  int64_t rows, in_features, out_features;  // in_features at most kLinear8bitFeatures
  int activation;                           // Activation, of the result
  int dtype, bias_dtype;                    // DType
  int threads;
};

// y = activation(x W^T + bias) for one row and a pruned 4-bit weight with a scale per group: see
// csrc/cpu/sparse_4bit.cpp.
struct Sparse4bitArgs {
  const float* x;          // fp32 [in_features, then 0 up to a multiple of 32]
  const uint8_t* bitmask;  // uint8 [out_features, 4 * ceil(in_features / 32)], bit k % 8 of byte k / 8 is column k
  const uint8_t* codes;    // the kept codes, two a byte, low half first, of each 32 columns from a whole byte on; 16
                           // readable bytes after the last
  const int64_t* offsets;  // int64 [out_features], byte where the codes of a row begin
  const void* scales;      // fp16 [out_features, ceil(in_features / group_size)]
  const float* table;      // fp32 [16]: what codes stand for, before scaling
  const void* bias;        // [out_features] of bias_dtype, or null
  void* y;                 // [out_features] of dtype
  int64_t in_features, out_features, group_size;  // group_size a multiple of 32
  int zero_code;                                  // the code whose table entry is 0
  int activation;                                 // Activation, of the result
  int dtype, bias_dtype;                          // DType
  int threads;
};

// Between a dense matrix and its bitmask + values, in either direction: see csrc/cpu/bitmask.cpp.
struct BitmaskArgs {
  const uint8_t* bitmask;  // uint8 [out_features, ceil(in_features / 8)]
  const int64_t* offsets;  // int64 [out_features + 1]
  void* values;            // [nnz] elements of element_size bytes, row-major: read by expand, written by gather
  void* dense;  // [out_features, in_features] elements of element_size bytes: written by expand, read by gather
  int64_t in_features, out_features;
  int element_size;  // 2 or 4
  int threads;
};

// X(op, arguments)
#define PYKD_OPS(X)                           \
  X(kl_div, KlDivArgs)                        \
  X(kl_div_topk, KlDivTopkArgs)               \
  X(linear_4bit, Linear4bitArgs)              \
  X(linear_4bit_rounded, Linear4bitArgs)      \
  X(linear_8bit, Linear8bitArgs)              \
  X(attention, AttentionArgs)                 \
  X(add_norm, AddNormArgs)                    \
  X(encoder_layer_8bit, EncoderLayer8bitArgs) \
  X(sparse_linear, SparseLinearArgs)          \
  X(sparse_panels, SparsePanelsArgs)          \
  X(sparse_8bit, Sparse8bitArgs)              \
  X(sparse_4bit, Sparse4bitArgs)              \
  X(bitmask_expand, BitmaskArgs)              \
  X(bitmask_gather, BitmaskArgs)

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
namespace avx512_bf16 {  // for the rest, the level avx512
PYKD_DECLARE(linear_4bit, Linear4bitArgs)
}
#undef PYKD_DECLARE

}  // namespace pykd
