// The layout `int4_r16` (pykd/ops/int4_r16.py) of a 4-bit weight, as its kernels walk it:
//
//   strip  32 output rows: [uint4 only: groups x 32 zero points, one byte each, padded to 64] groups blocks
//   block  one group of those rows: 32 scales, fp16 or fp32, then a pair of 64-byte lines per 8 k: rows 0-15, rows
//   16-31
//
// so that a thread reads its weights as one sequential stream.
#pragma once

#include "cpu/linear_rows.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {

struct Int4R16 {
  int64_t groups, group, padded_group, padded_last, padded_k, zero_bytes, scale_bytes, strip_bytes, strips;
  bool wide_scales;

  explicit Int4R16(const Linear4bitArgs& a) {
    const int64_t eight = 7;
    group = a.group_size < a.in_features ? a.group_size : a.in_features;
    groups = (a.in_features + group - 1) / group;
    padded_group = (group + eight) & ~eight;
    padded_last = (a.in_features - (groups - 1) * group + eight) & ~eight;
    padded_k = (groups - 1) * padded_group + padded_last;
    zero_bytes = a.code == kUint4 ? (groups * kStrip + 63) / 64 * 64 : 0;
    wide_scales = a.wide_scales != 0;
    scale_bytes = kStrip * (wide_scales ? 4 : 2);
    strip_bytes = zero_bytes + groups * scale_bytes + padded_k * (kStrip / 2);
    strips = (a.out_features + kStrip - 1) / kStrip;
  }
  int64_t size(int64_t g) const { return g + 1 < groups ? padded_group : padded_last; }  // k of group g in the layout
  PYKD_INLINE F32 scales(const uint8_t* block, int row) const {                          // of kWidth rows
    return wide_scales ? load(reinterpret_cast<const float*>(block) + row)
                       : load(reinterpret_cast<const F16*>(block) + row);
  }
  // Of `tiles` that use the weights of the groups [g, stop), and of those after them.
  PYKD_INLINE Prefetch prefetch(const uint8_t* strip, int64_t g, int64_t stop, int64_t tiles) const {
    if (kWidth * 2 == kStrip && tiles == 1)
      return {strip + (g > 0 ? block(g) : 0) + kAhead, (strip_bytes * 8 + padded_k - 1) / padded_k};
    return {strip + block(stop), (scale_bytes + padded_group * (kStrip / 2)) * 8 / (padded_group * tiles) + 1};
  }
  int64_t block(int64_t g) const {  // where group g starts in a strip
    return zero_bytes + g * (scale_bytes + padded_group * (kStrip / 2));
  }
};

}  // namespace pykd::PYKD_LEVEL
