#include "cpu/memory.h"

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pykd {
namespace {

constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

struct Scratch {
  void* memory = nullptr;
  std::size_t bytes = 0;
  ~Scratch() { std::free(memory); }
};

thread_local Scratch scratch;

}  // namespace

void* thread_scratch(std::size_t bytes) {
  if (bytes > scratch.bytes) {
    std::free(scratch.memory);
    const std::size_t rounded = (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
    scratch.memory = std::aligned_alloc(kCacheLine, rounded);
    scratch.bytes = scratch.memory != nullptr ? rounded : 0;
  }
  return scratch.memory;
}

void advise_huge_pages(void* memory, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace pykd
