// A dense matrix from its bitmask + values, and the values from a dense matrix: what training a sparse weight needs,
// forward (expand) and backward (gather). Both are bound by memory; the set bits of a byte are visited by
// count-trailing-zeros.
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops.h"

namespace pykd::PYKD_LEVEL {
namespace {

constexpr int64_t kElementsPerPiece = 1 << 15;  // a piece of work below this costs less than waking a thread

template <class T, bool kExpand>
void transfer(const BitmaskArgs& args) {
  const int64_t columns = args.in_features;
  const int64_t row_bytes = (columns + 7) / 8;
  const int64_t grain = kElementsPerPiece / (columns + 1) + 1;
  parallel_for(args.out_features, grain, args.threads, [&](int64_t first, int64_t last, int) {
    for (int64_t row = first; row < last; ++row) {
      const uint8_t* bits = args.bitmask + row * row_bytes;
      T* dense = static_cast<T*>(args.dense) + row * columns;
      T* value = static_cast<T*>(args.values) + args.offsets[row];
      if (kExpand) std::memset(dense, 0, static_cast<size_t>(columns) * sizeof(T));
      for (int64_t byte = 0; byte < row_bytes; ++byte) {
        for (uint32_t mask = bits[byte]; mask != 0; mask &= mask - 1) {
          T& cell = dense[byte * 8 + __builtin_ctz(mask)];
          if (kExpand)
            cell = *value++;
          else
            *value++ = cell;
        }
      }
    }
  });
}

}  // namespace

void bitmask_expand(const BitmaskArgs& args) {
  args.element_size == 4 ? transfer<uint32_t, true>(args) : transfer<uint16_t, true>(args);
}

void bitmask_gather(const BitmaskArgs& args) {
  args.element_size == 4 ? transfer<uint32_t, false>(args) : transfer<uint16_t, false>(args);
}

}  // namespace pykd::PYKD_LEVEL
