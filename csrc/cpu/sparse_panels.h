// The panels pack: a sparse weight as streams of (column index, value) that meet transposed panels of x. Written once
// by sparse_pack.cpp, read by sparse_panels.cpp and sparse_8bit.cpp at every instruction-set level; only constants and
// plain structs are shared.
//
//   bytes = SparsePanelsHeader
//           int64 offset[chunks * tiles + 1]      where the stream of (chunk, tile) begins, from the start of the bytes
//           streams
//
// A chunk is kPanelChunk rows of W, a tile `tile` columns. The rows of a stream are taken in items, sorted by their
// number of kept columns:
//   run   = uint16 groups, uint16 items           `items` items of `groups` groups each; 0, 0 ends the stream
//   item  = uint16 a, uint16 b, groups            rows within the chunk
// What an item and a group are depends on `packing`:
//   kPairs  rows a and b; b = kPanelChunk when a has no partner
//           group = uint8 column[4], float value[4]      entries 0, 2 belong to a, entries 1, 3 to b
//   kCodes  the same rows for integer weights
//           group = uint8 column[4], int16 value[4]      entries 0, 1 belong to a, entries 2, 3 to b
//   kQuads  rows a to a + 3, which keep the same columns (blocks of 4 x 1 and larger); b is 0
//           group = uint8 column[4], float value[4][4]   value[entry][row]
// Entries that only fill a group have value 0 and column `tile`, where every panel has a row of zeros, so that no
// activation is ever multiplied by a weight that was pruned.
//
// kWindows, int8 codes for AVX-512, is laid out by strips of kWindowOutputs rows instead; `tile` is not used:
//   bytes = SparsePanelsHeader
//           int64 offset[strips + 1]
//           strips, each from a multiple of 64 bytes on
//   strip = int32 start[kWindowOutputs]           minus 128 times the sum of the row's codes, modulo 2^32
//           uint32 begin[blocks + 1]              the first step of each kBlockWindows windows
//           uint16 window[steps]                  ascending; window i has the columns from 32 i to 32 i + 63
//           steps, from a multiple of 64 bytes on
//   step  = uint8 column[kWindowOutputs][4]       within the window
//           int8 code[kWindowOutputs][4]          0 where it only fills
// A step takes the next kept columns of each row, up to four, that its window has; the window is the last one with the
// first column that any row still has to take.
#pragma once

#include <cstdint>

namespace pykd {

constexpr int64_t kPanelChunk = 128;
constexpr int64_t kPanelMaxTile = 255;  // column indices are bytes and `tile` itself must be one
constexpr int64_t kPanelMaxWidth = 64;  // rows of x in the widest panel of any level

// The same numbers as PACKINGS in pykd/ops/sparse_panels.py.
enum Packing : int { kPairs = 0, kQuads = 1, kCodes = 2, kWindows = 3 };

constexpr int64_t group_bytes(int packing) { return packing == kPairs ? 20 : packing == kQuads ? 68 : 12; }

constexpr int64_t kWindowOutputs = 16, kWindowColumns = 64, kWindowStride = 32, kBlockWindows = 32;
constexpr int64_t kWindowStepBytes = 128;
constexpr int64_t kWindowsPassRows = 240;  // rows of x that a call takes at a time
constexpr int64_t kWindowsGroup = 8;       // strips whose sums a thread has at a time

constexpr int64_t windows_header_bytes(int64_t blocks, int64_t steps) {  // of a strip, before its steps
  return (4 * kWindowOutputs + 4 * (blocks + 1) + 2 * steps + 63) / 64 * 64;
}

struct SparsePanelsHeader {
  int64_t bytes, in_features, out_features, nnz, tile, packing;
};

}  // namespace pykd
