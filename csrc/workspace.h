// Memory that a kernel works in.
#pragma once
#include <cstddef>

namespace hrpose {

// Asks for huge pages; a system that has none, or refuses, changes nothing.
void advise_huge_pages(void *begin, std::size_t size);

// Uninitialised memory of `size` bytes, at the beginning of a cache line, for the calling thread until its next call;
// null if there is none. It is kept for later calls; much memory until one needs little.
void *workspace(std::size_t size);

} // namespace hrpose
