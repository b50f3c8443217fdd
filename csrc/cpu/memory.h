// Scratch memory that each thread keeps between calls.
#pragma once

#include <cstddef>

namespace pykd {

// At least `bytes` of 64-byte aligned memory that belongs to the calling thread until it asks again, or null when there
// is none. It grows and is reused: fresh pages would cost more than the arithmetic done in them.
void* thread_scratch(std::size_t bytes);

}  // namespace pykd
