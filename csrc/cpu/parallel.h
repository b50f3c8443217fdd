// Loops over torch's OpenMP runtime. Only included by the translation units of one instruction-set level each.
#pragma once

#include <cstdint>

namespace pykd::PYKD_LEVEL {

// Calls fn(first, last, thread) on consecutive pieces of [0, count), one piece a thread, at most `threads` of them and
// none smaller than `grain` unless count is. fn must not throw.
template <class Fn>
inline void parallel_for(int64_t count, int64_t grain, int threads, const Fn& fn) {
  if (count <= 0) return;
  int64_t pieces = grain > 0 ? (count + grain - 1) / grain : count;
  if (pieces > threads) pieces = threads;
  if (pieces <= 1) {
    fn(int64_t{0}, count, 0);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(pieces))
#pragma omp for schedule(static, 1)
#endif
  for (int64_t piece = 0; piece < pieces; ++piece)
    fn(count * piece / pieces, count * (piece + 1) / pieces, static_cast<int>(piece));
}

}  // namespace pykd::PYKD_LEVEL
