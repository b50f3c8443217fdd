#include "cpu/memory.h"

#include <cstdlib>

namespace pykd {
namespace {

constexpr std::size_t kCacheLine = 64;

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

}  // namespace pykd
