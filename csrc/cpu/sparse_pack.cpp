#include "cpu/sparse_pack.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/sparse_panels.h"

namespace pykd {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Weight {
  const uint8_t* bitmask;
  const void* values;
  int64_t in_features, out_features, tile;
  int packing;

  int64_t height() const { return packing == kQuads ? 4 : 1; }  // rows that share their columns
  double value(int64_t index) const {
    return packing == kCodes ? static_cast<const int8_t*>(values)[index] : static_cast<const float*>(values)[index];
  }
};

// Rows that share their columns, within one tile. Rows past the last one of the weight have first = -1.
struct Unit {
  std::vector<uint8_t> columns;
  int64_t first[4] = {-1, -1, -1, -1};  // index of the first of their values in each row

  double value(const Weight& weight, size_t entry, int64_t row) const {
    const bool kept = entry < columns.size() && first[row] >= 0;
    return kept ? weight.value(first[row] + static_cast<int64_t>(entry)) : 0.0;
  }
};

// A stream without its bytes: what both the size and the writing of it follow from.
struct Stream {
  const Weight& weight;
  std::vector<Unit> units;     // of the chunk
  std::vector<int64_t> order;  // units with at least one entry, longest first

  // next: for each row of the chunk, the index of its first value that no stream before this one took; advanced.
  Stream(const Weight& w, int64_t row0, int64_t row1, int64_t column0, int64_t column1, std::vector<int64_t>& next)
      : weight(w), units(static_cast<size_t>(ceil_div(row1 - row0, w.height()))) {
    const int64_t row_bytes = ceil_div(w.in_features, 8);
    for (int64_t i = 0; i < static_cast<int64_t>(units.size()); ++i) {
      Unit& unit = units[static_cast<size_t>(i)];
      const uint8_t* bits = w.bitmask + (row0 + i * w.height()) * row_bytes;
      for (int64_t column = column0; column < column1; ++column)
        if (bits[column / 8] >> (column % 8) & 1) unit.columns.push_back(static_cast<uint8_t>(column - column0));
      for (int64_t row = 0; row < w.height() && row0 + i * w.height() + row < row1; ++row) {
        int64_t& index = next[static_cast<size_t>(i * w.height() + row)];
        unit.first[row] = index;
        index += static_cast<int64_t>(unit.columns.size());
      }
      if (!unit.columns.empty()) order.push_back(i);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return size(a) > size(b); });
  }

  size_t size(int64_t unit) const { return units[static_cast<size_t>(unit)].columns.size(); }
  int64_t together() const { return weight.packing == kQuads ? 1 : 2; }  // units of an item
  int64_t items() const { return ceil_div(static_cast<int64_t>(order.size()), together()); }
  int64_t groups(int64_t item) const {  // the first of an item is the longest
    const int64_t entries = static_cast<int64_t>(size(order[static_cast<size_t>(together() * item)]));
    return ceil_div(entries, weight.packing == kQuads ? 4 : 2);
  }

  int64_t bytes() const {
    int64_t total = 4;
    for (int64_t item = 0; item < items(); ++item) {
      if (item == 0 || groups(item) != groups(item - 1)) total += 4;
      total += 4 + groups(item) * group_bytes(weight.packing);
    }
    return total;
  }

  void write(uint8_t* out) const {
    for (int64_t item = 0; item < items();) {
      int64_t end = item;
      while (end < items() && groups(end) == groups(item)) ++end;
      put_two(out, groups(item), end - item);
      for (; item < end; ++item) weight.packing == kQuads ? write_quad(item, out) : write_pair(item, out);
    }
    put_two(out, 0, 0);
  }

 private:
  template <class T>
  static void put(uint8_t*& out, T value) {
    std::memcpy(out, &value, sizeof value);
    out += sizeof value;
  }
  static void put_two(uint8_t*& out, int64_t first, int64_t second) {
    put(out, static_cast<uint16_t>(first));
    put(out, static_cast<uint16_t>(second));
  }
  uint8_t column(const Unit& unit, size_t entry) const {
    return entry < unit.columns.size() ? unit.columns[entry] : static_cast<uint8_t>(weight.tile);
  }

  void write_pair(int64_t item, uint8_t*& out) const {
    static const Unit none;
    const size_t second = static_cast<size_t>(2 * item + 1);
    const bool alone = second >= order.size();
    const int64_t a = order[static_cast<size_t>(2 * item)];
    const int64_t b = alone ? kPanelChunk : order[second];
    const Unit* units_of[2] = {&units[static_cast<size_t>(a)], alone ? &none : &units[static_cast<size_t>(b)]};
    put_two(out, a, b);
    const bool codes = weight.packing == kCodes;
    const auto unit_of = [&](int slot) -> const Unit& { return *units_of[codes ? slot / 2 : slot % 2]; };
    for (int64_t group = 0; group < groups(item); ++group) {
      const auto entry_of = [&](int slot) { return static_cast<size_t>(group * 2 + (codes ? slot % 2 : slot / 2)); };
      for (int slot = 0; slot < 4; ++slot) put(out, column(unit_of(slot), entry_of(slot)));
      for (int slot = 0; slot < 4; ++slot) {
        const double value = unit_of(slot).value(weight, entry_of(slot), 0);
        codes ? put(out, static_cast<int16_t>(value)) : put(out, static_cast<float>(value));
      }
    }
  }

  void write_quad(int64_t item, uint8_t*& out) const {
    const int64_t a = order[static_cast<size_t>(item)];
    const Unit& unit = units[static_cast<size_t>(a)];
    put_two(out, 4 * a, 0);
    for (int64_t group = 0; group < groups(item); ++group) {
      const size_t entry = static_cast<size_t>(4 * group);
      for (size_t i = 0; i < 4; ++i) put(out, column(unit, entry + i));
      for (size_t i = 0; i < 4; ++i)
        for (int64_t row = 0; row < 4; ++row) put(out, static_cast<float>(unit.value(weight, entry + i, row)));
    }
  }
};

// The steps of a strip of kWindows.
struct Strip {
  struct Step {
    int64_t window;
    uint8_t column[kWindowOutputs][4];
    int64_t index[kWindowOutputs][4];  // of the value; -1 where there is none
  };
  std::vector<Step> steps;
  int64_t blocks;

  // offsets may be null when only sizes matter.
  Strip(const Weight& w, const int64_t* offsets, int64_t row0)
      : blocks(ceil_div(ceil_div(w.in_features, kWindowStride), kBlockWindows)) {
    const int64_t row_bytes = ceil_div(w.in_features, 8);
    std::vector<int64_t> columns[kWindowOutputs];
    size_t taken[kWindowOutputs] = {};
    for (int64_t lane = 0; lane < kWindowOutputs && row0 + lane < w.out_features; ++lane) {
      const uint8_t* bits = w.bitmask + (row0 + lane) * row_bytes;
      for (int64_t column = 0; column < w.in_features; ++column)
        if (bits[column / 8] >> (column % 8) & 1) columns[lane].push_back(column);
    }
    for (;;) {
      int64_t least = w.in_features;
      for (int64_t lane = 0; lane < kWindowOutputs; ++lane)
        if (taken[lane] < columns[lane].size()) least = std::min(least, columns[lane][taken[lane]]);
      if (least == w.in_features) return;
      steps.push_back({});
      Step& step = steps.back();
      step.window = least / kWindowStride;
      const int64_t first = step.window * kWindowStride;
      for (int64_t lane = 0; lane < kWindowOutputs; ++lane)
        for (int entry = 0; entry < 4; ++entry) {
          size_t& next = taken[lane];
          const bool fits = next < columns[lane].size() && columns[lane][next] < first + kWindowColumns;
          step.column[lane][entry] = fits ? static_cast<uint8_t>(columns[lane][next] - first) : 0;
          step.index[lane][entry] = fits ? (offsets ? offsets[row0 + lane] : 0) + static_cast<int64_t>(next) : -1;
          if (fits) ++next;
        }
    }
  }

  int64_t bytes() const {
    const int64_t count = static_cast<int64_t>(steps.size());
    return windows_header_bytes(blocks, count) + kWindowStepBytes * count;
  }

  void write(const int8_t* codes, uint8_t* out) const {
    uint32_t starts[kWindowOutputs] = {};
    std::vector<uint32_t> begins(static_cast<size_t>(blocks + 1), static_cast<uint32_t>(steps.size()));
    uint8_t* windows = out + sizeof starts + 4 * begins.size();
    uint8_t* line = out + windows_header_bytes(blocks, static_cast<int64_t>(steps.size()));
    std::memset(out, 0, static_cast<size_t>(line - out));
    for (size_t i = steps.size(); i-- > 0;) {
      const Step& step = steps[i];
      for (int64_t block = 0; block <= step.window / kBlockWindows; ++block)
        begins[static_cast<size_t>(block)] = static_cast<uint32_t>(i);
      const uint16_t window = static_cast<uint16_t>(step.window);
      std::memcpy(windows + 2 * i, &window, 2);
      std::memcpy(line + kWindowStepBytes * static_cast<int64_t>(i), step.column, sizeof step.column);
      for (int64_t lane = 0; lane < kWindowOutputs; ++lane)
        for (int entry = 0; entry < 4; ++entry) {
          const int8_t code = step.index[lane][entry] < 0 ? int8_t{0} : codes[step.index[lane][entry]];
          starts[lane] -= 128u * static_cast<uint32_t>(code);
          line[kWindowStepBytes * static_cast<int64_t>(i) + 64 + 4 * lane + entry] = static_cast<uint8_t>(code);
        }
    }
    std::memcpy(out, starts, sizeof starts);
    std::memcpy(out + sizeof starts, begins.data(), 4 * begins.size());
  }
};

int64_t strips_begin(int64_t out_features) {
  const int64_t strips = ceil_div(out_features, kWindowOutputs);
  return ceil_div(static_cast<int64_t>(sizeof(SparsePanelsHeader)) + 8 * (strips + 1), 64) * 64;
}

void unpack_windows(const SparsePanelsHeader& header, const uint8_t* pack, int8_t* dense) {
  const int64_t blocks = ceil_div(ceil_div(header.in_features, kWindowStride), kBlockWindows);
  for (int64_t row = 0; row < header.out_features; row += kWindowOutputs) {
    int64_t offset;
    std::memcpy(&offset, pack + sizeof header + 8 * (row / kWindowOutputs), 8);
    const uint8_t* begins = pack + offset + 4 * kWindowOutputs;
    uint32_t steps;
    std::memcpy(&steps, begins + 4 * blocks, 4);
    const uint8_t* line = pack + offset + windows_header_bytes(blocks, steps);
    for (uint32_t step = 0; step < steps; ++step, line += kWindowStepBytes) {
      uint16_t window;
      std::memcpy(&window, begins + 4 * (blocks + 1) + 2 * step, 2);
      for (int64_t i = 0; i < 4 * kWindowOutputs; ++i)
        if (line[64 + i] != 0)
          dense[(row + i / 4) * header.in_features + window * kWindowStride + line[i]] =
              static_cast<int8_t>(line[64 + i]);
    }
  }
}

// Calls visit(stream) for every stream in the order of the pack. offsets may be null when only sizes matter.
template <class Visit>
void for_streams(const Weight& weight, const int64_t* offsets, const Visit& visit) {
  std::vector<int64_t> next;
  for (int64_t row = 0; row < weight.out_features; row += kPanelChunk) {
    const int64_t end = std::min(row + kPanelChunk, weight.out_features);
    next.assign(static_cast<size_t>(end - row), 0);
    if (offsets) std::copy(offsets + row, offsets + end, next.begin());
    for (int64_t column = 0; column < weight.in_features; column += weight.tile)
      visit(Stream(weight, row, end, column, std::min(column + weight.tile, weight.in_features), next));
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

int64_t sparse_panels_bytes(const uint8_t* bitmask, int64_t in_features, int64_t out_features, int64_t tile,
                            int packing) {
  if (packing == kWindows) {
    const Weight weight{bitmask, nullptr, in_features, out_features, tile, packing};
    int64_t total = strips_begin(out_features);
    for (int64_t row = 0; row < out_features; row += kWindowOutputs) total += Strip(weight, nullptr, row).bytes();
    return total;
  }
  int64_t total = streams_begin(in_features, out_features, tile);
  for_streams({bitmask, nullptr, in_features, out_features, tile, packing}, nullptr,
              [&](const Stream& stream) { total += stream.bytes(); });
  return total;
}

int64_t sparse_panels_scratch(int64_t rows, int64_t in_features, int64_t tile, int threads) {
  const int64_t columns = ceil_div(in_features, tile) * (tile + 1);
  return (rows + kPanelMaxWidth) * columns + threads * (kPanelChunk + 1) * kPanelMaxWidth;
}

int64_t sparse_8bit_scratch(int64_t rows, int64_t in_features, int64_t tile, int threads) {
  const int64_t columns = ceil_div(in_features, tile) * (tile + 1);
  const int64_t panels = ceil_div((rows + kPanelMaxWidth) * columns, 2) + threads * (kPanelChunk + 1) * kPanelMaxWidth;
  const int64_t pass = std::min(rows, kWindowsPassRows);
  const int64_t windows = 16 + pass * ceil_div(in_features, kWindowStride) * kWindowColumns / 4 +
                          threads * pass * kWindowsGroup * kWindowOutputs;
  return rows + std::max(panels, windows);
}

void sparse_panels_pack(const uint8_t* bitmask, const void* values, const int64_t* offsets, int64_t in_features,
                        int64_t out_features, int64_t tile, int packing, uint8_t* pack) {
  SparsePanelsHeader header = {0, in_features, out_features, offsets[out_features], tile, packing};
  if (packing == kWindows) {
    const Weight weight{bitmask, values, in_features, out_features, tile, packing};
    int64_t at = strips_begin(out_features);
    uint8_t* offset = pack + sizeof header;
    std::memset(offset, 0, static_cast<size_t>(at) - sizeof header);
    for (int64_t row = 0; row < out_features; row += kWindowOutputs, offset += 8) {
      const Strip strip(weight, offsets, row);
      std::memcpy(offset, &at, 8);
      strip.write(static_cast<const int8_t*>(values), pack + at);
      at += strip.bytes();
    }
    std::memcpy(offset, &at, 8);
    header.bytes = at;
    std::memcpy(pack, &header, sizeof header);
    return;
  }
  int64_t at = streams_begin(in_features, out_features, tile);
  uint8_t* offset = pack + sizeof header;
  for_streams({bitmask, values, in_features, out_features, tile, packing}, offsets, [&](const Stream& stream) {
    std::memcpy(offset, &at, 8);
    offset += 8;
    stream.write(pack + at);
    at += stream.bytes();
  });
  std::memcpy(offset, &at, 8);
  header.bytes = at;
  std::memcpy(pack, &header, sizeof header);
}

void sparse_pack_check(const uint8_t* pack, int64_t in_features, int64_t out_features, int packing) {
  SparsePanelsHeader header;
  std::memcpy(&header, pack, sizeof header);
  if (header.in_features != in_features || header.out_features != out_features || header.packing != packing)
    throw std::invalid_argument("the pack is of another weight: [" + std::to_string(header.out_features) + ", " +
                                std::to_string(header.in_features) + "] in packing " + std::to_string(header.packing) +
                                ", not [" + std::to_string(out_features) + ", " + std::to_string(in_features) +
                                "] in " + std::to_string(packing));
}

int codes_packing() { return isa().rfind("avx512", 0) == 0 ? kWindows : kCodes; }

void sparse_codes_unpack(const uint8_t* pack, int8_t* dense) {
  SparsePanelsHeader header;
  std::memcpy(&header, pack, sizeof header);
  std::fill(dense, dense + header.in_features * header.out_features, int8_t{0});
  if (header.packing == kWindows) return unpack_windows(header, pack, dense);
  const int64_t tiles = ceil_div(header.in_features, header.tile);
  const int64_t streams = tiles * ceil_div(header.out_features, kPanelChunk);
  for (int64_t stream = 0; stream < streams; ++stream) {
    int64_t offset;
    std::memcpy(&offset, pack + sizeof header + 8 * stream, 8);
    const uint8_t* at = pack + offset;
    int8_t* corner = dense + stream / tiles * kPanelChunk * header.in_features + stream % tiles * header.tile;
    for (uint16_t run[2];;) {
      std::memcpy(run, at, 4);
      at += 4;
      if (run[0] == 0) break;
      for (uint32_t item = 0; item < run[1]; ++item) {
        uint16_t rows[2];
        std::memcpy(rows, at, 4);
        at += 4;
        for (uint32_t group = 0; group < run[0]; ++group, at += group_bytes(kCodes))
          for (int slot = 0; slot < 4; ++slot) {
            int16_t value;
            std::memcpy(&value, at + 4 + 2 * slot, 2);
            if (at[slot] != header.tile)
              corner[rows[slot / 2] * header.in_features + at[slot]] = static_cast<int8_t>(value);
          }
      }
    }
  }
}

}  // namespace pykd
