// The layout `int4_r16` (pykd/ops/int4_r16.py) of a 4-bit weight, as its kernels walk it:
//
//   strip  32 output rows: [uint4 only: groups x 32 zero points, one byte each, padded to 64] groups blocks
//   block  one group of those rows: 32 fp16 scales, then a pair of 64-byte lines per 8 k: rows 0-15, rows 16-31
//
// so that a thread reads its weights as one sequential stream.
#pragma once

#include "cpu/linear_rows.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {

constexpr int64_t kScaleBytes = kStrip * 2;

struct Int4R16 {
  int64_t groups, group, padded_group, padded_last, padded_k, zero_bytes, strip_bytes, strips;

  explicit Int4R16(const Linear4bitArgs& a) {
    const int64_t eight = 7;
    group = a.group_size < a.in_features ? a.group_size : a.in_features;
    groups = (a.in_features + group - 1) / group;
    padded_group = (group + eight) & ~eight;
    padded_last = (a.in_features - (groups - 1) * group + eight) & ~eight;
    padded_k = (groups - 1) * padded_group + padded_last;
    zero_bytes = a.code == kUint4 ? (groups * kStrip + 63) / 64 * 64 : 0;
    strip_bytes = zero_bytes + groups * kScaleBytes + padded_k * (kStrip / 2);
    strips = (a.out_features + kStrip - 1) / kStrip;
  }
  int64_t size(int64_t g) const { return g + 1 < groups ? padded_group : padded_last; }  // k of group g in the layout
  int64_t block(int64_t g) const {  // where group g starts in a strip
    return zero_bytes + g * (kScaleBytes + padded_group * (kStrip / 2));
  }
};

}  // namespace pykd::PYKD_LEVEL
