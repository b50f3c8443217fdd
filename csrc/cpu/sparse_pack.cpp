#include "cpu/sparse_pack.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "cpu/sparse_panels.h"

namespace pykd {
namespace {

struct Entries {  // the kept columns of one row within one tile
  std::vector<uint8_t> columns;
  int64_t first = 0;  // index of the first one's value
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A stream without its bytes: what both the size and the writing of it follow from.
struct Stream {
  std::vector<Entries> rows;   // of the chunk
  std::vector<int64_t> order;  // rows with at least one entry, longest first

  // next: for each row of the chunk, the index of its first value that no stream before this one took; advanced.
  Stream(const uint8_t* bitmask, int64_t in_features, int64_t row0, int64_t row1, int64_t column0, int64_t column1,
         std::vector<int64_t>& next)
      : rows(static_cast<size_t>(row1 - row0)) {
    const int64_t row_bytes = ceil_div(in_features, 8);
    for (int64_t row = row0; row < row1; ++row) {
      const uint8_t* bits = bitmask + row * row_bytes;
      Entries& entries = rows[static_cast<size_t>(row - row0)];
      for (int64_t column = column0; column < column1; ++column)
        if (bits[column / 8] >> (column % 8) & 1) entries.columns.push_back(static_cast<uint8_t>(column - column0));
      entries.first = next[static_cast<size_t>(row - row0)];
      next[static_cast<size_t>(row - row0)] += static_cast<int64_t>(entries.columns.size());
      if (!entries.columns.empty()) order.push_back(row - row0);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return size(a) > size(b); });
  }

  size_t size(int64_t row) const { return rows[static_cast<size_t>(row)].columns.size(); }
  int64_t pairs() const { return ceil_div(static_cast<int64_t>(order.size()), 2); }
  int64_t groups(int64_t pair) const {  // the first of a pair is the longer
    return ceil_div(static_cast<int64_t>(size(order[static_cast<size_t>(2 * pair)])), 2);
  }

  int64_t bytes() const {
    int64_t total = 4;
    for (int64_t pair = 0; pair < pairs(); ++pair) {
      if (pair == 0 || groups(pair) != groups(pair - 1)) total += 4;
      total += 4 + groups(pair) * kPanelGroupBytes;
    }
    return total;
  }

  void write(const float* values, int64_t tile, uint8_t* out) const {
    for (int64_t pair = 0; pair < pairs();) {
      int64_t end = pair;
      while (end < pairs() && groups(end) == groups(pair)) ++end;
      put(out, static_cast<uint16_t>(groups(pair)), static_cast<uint16_t>(end - pair));
      for (; pair < end; ++pair) write_pair(values, tile, pair, out);
    }
    put(out, 0, 0);
  }

 private:
  static void put(uint8_t*& out, uint16_t first, uint16_t second) {
    std::memcpy(out, &first, 2);
    std::memcpy(out + 2, &second, 2);
    out += 4;
  }

  void write_pair(const float* values, int64_t tile, int64_t pair, uint8_t*& out) const {
    static const Entries none;
    const size_t second = static_cast<size_t>(2 * pair + 1);
    const bool alone = second >= order.size();
    const int64_t a = order[static_cast<size_t>(2 * pair)];
    const int64_t b = alone ? kPanelChunk : order[second];
    const Entries* entries[2] = {&rows[static_cast<size_t>(a)], alone ? &none : &rows[static_cast<size_t>(b)]};
    put(out, static_cast<uint16_t>(a), static_cast<uint16_t>(b));
    for (int64_t group = 0; group < groups(pair); ++group, out += kPanelGroupBytes) {
      for (int slot = 0; slot < 4; ++slot) {
        const Entries& row = *entries[slot % 2];
        const size_t index = static_cast<size_t>(group * 2 + slot / 2);
        const bool filled = index < row.columns.size();
        const float value = filled ? values[row.first + static_cast<int64_t>(index)] : 0.0f;
        out[slot] = filled ? row.columns[index] : static_cast<uint8_t>(tile);
        std::memcpy(out + 4 + 4 * slot, &value, 4);
      }
    }
  }
};

// Calls visit(stream) for every stream in the order of the pack. offsets may be null when only sizes matter.
template <class Visit>
void for_streams(const uint8_t* bitmask, const int64_t* offsets, int64_t in_features, int64_t out_features,
                 int64_t tile, const Visit& visit) {
  std::vector<int64_t> next;
  for (int64_t row = 0; row < out_features; row += kPanelChunk) {
    const int64_t end = std::min(row + kPanelChunk, out_features);
    next.assign(static_cast<size_t>(end - row), 0);
    if (offsets) std::copy(offsets + row, offsets + end, next.begin());
    for (int64_t column = 0; column < in_features; column += tile)
      visit(Stream(bitmask, in_features, row, end, column, std::min(column + tile, in_features), next));
  }
}

int64_t streams_begin(int64_t in_features, int64_t out_features, int64_t tile) {
  if (tile < 1 || tile > kPanelMaxTile) throw std::invalid_argument("a panel's tile has 1 to 255 columns");
  const int64_t streams = ceil_div(out_features, kPanelChunk) * ceil_div(in_features, tile);
  return static_cast<int64_t>(sizeof(SparsePanelsHeader)) + 8 * (streams + 1);
}

}  // namespace

int64_t bitmask_offsets(const uint8_t* bitmask, int64_t in_features, int64_t out_features, int64_t* offsets) {
  const int64_t row_bytes = ceil_div(in_features, 8);
  int64_t total = 0;
  for (int64_t row = 0; row < out_features; ++row) {
    const uint8_t* bits = bitmask + row * row_bytes;
    if (in_features % 8 != 0 && bits[row_bytes - 1] >> (in_features % 8) != 0) return row;
    offsets[row] = total;
    int64_t byte = 0;
    for (; byte + 8 <= row_bytes; byte += 8) {
      uint64_t word;
      std::memcpy(&word, bits + byte, 8);
      total += __builtin_popcountll(word);
    }
    for (; byte < row_bytes; ++byte) total += __builtin_popcount(bits[byte]);
  }
  offsets[out_features] = total;
  return -1;
}

int64_t sparse_panels_bytes(const uint8_t* bitmask, int64_t in_features, int64_t out_features, int64_t tile) {
  int64_t total = streams_begin(in_features, out_features, tile);
  for_streams(bitmask, nullptr, in_features, out_features, tile,
              [&](const Stream& stream) { total += stream.bytes(); });
  return total;
}

int64_t sparse_panels_scratch(int64_t rows, int64_t in_features, int64_t tile, int threads) {
  const int64_t columns = ceil_div(in_features, tile) * (tile + 1);
  return (rows + kPanelMaxWidth) * columns + threads * (kPanelChunk + 1) * kPanelMaxWidth;
}

void sparse_panels_pack(const uint8_t* bitmask, const float* values, const int64_t* offsets, int64_t in_features,
                        int64_t out_features, int64_t tile, uint8_t* pack) {
  SparsePanelsHeader header = {0, in_features, out_features, offsets[out_features], tile};
  int64_t at = streams_begin(in_features, out_features, tile);
  uint8_t* offset = pack + sizeof header;
  for_streams(bitmask, offsets, in_features, out_features, tile, [&](const Stream& stream) {
    std::memcpy(offset, &at, 8);
    offset += 8;
    stream.write(values, tile, pack + at);
    at += stream.bytes();
  });
  std::memcpy(offset, &at, 8);
  header.bytes = at;
  std::memcpy(pack, &header, sizeof header);
}

}  // namespace pykd
