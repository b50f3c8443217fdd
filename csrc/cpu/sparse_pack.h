// Measuring a bitmask, and writing the panels pack (layout: csrc/cpu/sparse_panels.h). Baseline code, never in a hot
// loop.
#pragma once

#include <cstdint>

namespace pykd {

// offsets[r] = kept columns before row r, int64 [out_features + 1]. Returns -1, or the first row whose last byte has a
// bit set at or beyond in_features.
int64_t bitmask_offsets(const uint8_t* bitmask, int64_t in_features, int64_t out_features, int64_t* offsets);

// Bytes of the panels pack of a weight given by its bitmask: uint8 [out_features, ceil(in_features / 8)].
int64_t sparse_panels_bytes(const uint8_t* bitmask, int64_t in_features, int64_t out_features, int64_t tile);

// Writes the pack; values is fp32 [nnz], row-major, offsets int64 [out_features + 1].
void sparse_panels_pack(const uint8_t* bitmask, const float* values, const int64_t* offsets, int64_t in_features,
                        int64_t out_features, int64_t tile, uint8_t* pack);

// Floats of scratch that sparse_panels needs for `rows` rows of x on `threads` threads.
int64_t sparse_panels_scratch(int64_t rows, int64_t in_features, int64_t tile, int threads);

}  // namespace pykd
