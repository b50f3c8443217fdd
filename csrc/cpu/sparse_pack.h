// Measuring a bitmask, and writing the panels pack (layout: csrc/cpu/sparse_panels.h). Baseline code, never in a hot
// loop.
#pragma once

#include <cstdint>

namespace pykd {

// offsets[r] = kept columns before row r, int64 [out_features + 1]. Returns -1, or the first row whose last byte has a
// bit set at or beyond in_features.
int64_t bitmask_offsets(const uint8_t* bitmask, int64_t in_features, int64_t out_features, int64_t* offsets);

// Bytes of the panels pack of a weight given by its bitmask: uint8 [out_features, ceil(in_features / 8)]. With kQuads
// rows 4 i to 4 i + 3 have the same bits.
int64_t sparse_panels_bytes(const uint8_t* bitmask, int64_t in_features, int64_t out_features, int64_t tile,
                            int packing);

// Writes the pack; values is [nnz], row-major, int8 for kCodes, else fp32; offsets int64 [out_features + 1].
void sparse_panels_pack(const uint8_t* bitmask, const void* values, const int64_t* offsets, int64_t in_features,
                        int64_t out_features, int64_t tile, int packing, uint8_t* pack);

// Throws std::invalid_argument unless the pack holds a weight of these sizes in this packing.
void sparse_pack_check(const uint8_t* pack, int64_t in_features, int64_t out_features, int packing);

// The dense weight, int8 [out_features, in_features], of a pack of kCodes or kWindows.
void sparse_codes_unpack(const uint8_t* pack, int8_t* dense);

// The packing of int8 codes that sparse_8bit reads at the level in force: kWindows with AVX-512, else kCodes.
int codes_packing();

// Floats of scratch that sparse_panels needs for `rows` rows of x on `threads` threads.
int64_t sparse_panels_scratch(int64_t rows, int64_t in_features, int64_t tile, int threads);

// The same for sparse_8bit.
int64_t sparse_8bit_scratch(int64_t rows, int64_t in_features, int64_t tile, int threads);

}  // namespace pykd
