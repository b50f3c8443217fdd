// Reading a panels pack (csrc/cpu/sparse_panels.h): what the kernels over fp32 and int8 weights share. Only included by
// the units of one instruction-set level each.
#pragma once

#include <cstring>

#include "cpu/parallel.h"
#include "cpu/sparse_panels.h"
#include "cpu/vec.h"

namespace pykd::PYKD_LEVEL {

// Waking a thread costs a few microseconds: work below about 30 stays on one.
constexpr int64_t kElementsPerPiece = 1 << 16;  // elements of x to transpose
constexpr int64_t kVectorsPerPiece = 1 << 16;   // kept weights x vectors of rows to multiply

struct Pack {
  SparsePanelsHeader header;
  const uint8_t* bytes;
  int64_t tiles, chunks;

  explicit Pack(const uint8_t* start) : bytes(start) {
    std::memcpy(&header, start, sizeof header);
    tiles = (header.in_features + header.tile - 1) / header.tile;
    chunks = (header.out_features + kPanelChunk - 1) / kPanelChunk;
  }
  int64_t offset(int64_t chunk, int64_t tile) const {
    int64_t at;
    std::memcpy(&at, bytes + sizeof header + 8 * (chunk * tiles + tile), 8);
    return at;
  }
  int64_t panel_columns() const { return tiles * (header.tile + 1); }
};

PYKD_INLINE void read_two(const uint8_t*& at, uint32_t& first, uint32_t& second) {
  uint16_t both[2];
  std::memcpy(both, at, 4);
  first = both[0];
  second = both[1];
  at += 4;
}

// Calls run(first chunk, last chunk, thread). A thread takes the chunks whose streams begin in its share of the bytes,
// so that threads have equal work whatever the rows hold, and any number of threads can run a pack.
template <class Run>
void for_chunk_shares(const Pack& pack, int64_t vectors, int threads, const Run& run) {
  int64_t shares = pack.header.nnz * vectors / kVectorsPerPiece + 1;
  if (shares > threads) shares = threads;
  if (shares > pack.chunks) shares = pack.chunks;
  const int64_t begin = pack.offset(0, 0);
  const int64_t total = pack.offset(pack.chunks, 0) - begin;
  parallel_for(shares, 1, threads, [&](int64_t first, int64_t last, int thread) {
    int64_t chunk = 0;
    while (chunk < pack.chunks && pack.offset(chunk, 0) - begin < total * first / shares) ++chunk;
    int64_t end = chunk;
    while (end < pack.chunks && (last == shares || pack.offset(end, 0) - begin < total * last / shares)) ++end;
    run(chunk, end, thread);
  });
}

}  // namespace pykd::PYKD_LEVEL
