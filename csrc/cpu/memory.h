// Memory for kernels: scratch that each thread keeps between calls, and huge pages for large fresh outputs.
#pragma once

#include <cstddef>

namespace pykd {

// At least `bytes` of 64-byte aligned memory that belongs to the calling thread until it asks again, or null when there
// is none. It grows and is reused: fresh pages would cost more than the arithmetic done in them.
void* thread_scratch(std::size_t bytes);

// Advise the kernel to back the whole 2 MB pages inside [memory, memory + bytes) by huge pages. A hint: where it is not
// understood nothing happens. Worth it only before the first touch of a large buffer, whose page faults otherwise cost
// about three times the arithmetic of a memory-bound kernel.
void advise_huge_pages(void* memory, std::size_t bytes);

}  // namespace pykd
