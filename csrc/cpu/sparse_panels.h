// The panels pack: a sparse weight as streams of (column index, value) that meet transposed panels of x. Written once
// by sparse_pack.cpp, read by sparse_panels.cpp at every instruction-set level; only constants and plain structs are
// shared.
//
//   bytes = SparsePanelsHeader
//           int64 offset[chunks * tiles + 1]      where the stream of (chunk, tile) begins, from the start of the bytes
//           streams
//
// A chunk is kPanelChunk rows of W, a tile `tile` columns. In each stream the rows are sorted by their number of kept
// columns and taken in pairs (a, b):
//   run   = uint16 groups, uint16 pairs           `pairs` pairs of `groups` groups each; 0, 0 ends the stream
//   pair  = uint16 a, uint16 b, groups            rows within the chunk; b = kPanelChunk when a has no partner
//   group = uint8 column[4], float value[4]       entries 0, 2 belong to a, entries 1, 3 to b
// Entries that only fill a group have value 0 and column `tile`, where every panel has a row of zeros, so that no
// activation is ever multiplied by a weight that was pruned.
#pragma once

#include <cstdint>

namespace pykd {

constexpr int64_t kPanelChunk = 128;
constexpr int64_t kPanelMaxTile = 255;  // column indices are bytes and `tile` itself must be one
constexpr int64_t kPanelGroupBytes = 20;
constexpr int64_t kPanelMaxWidth = 64;  // rows of x in the widest panel of any level

struct SparsePanelsHeader {
  int64_t bytes, in_features, out_features, nnz, tile;
};

}  // namespace pykd
