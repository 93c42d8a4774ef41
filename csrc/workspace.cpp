#include "workspace.h"
#include <cstdlib>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace hrpose {

namespace {

constexpr std::size_t kHugePage = std::size_t(2) << 20; // HUGE_PAGE in hrpose/ops/_ext.py
constexpr std::size_t kKept = std::size_t(64) << 20;    // KEPT there

struct Memory {
  void *begin = nullptr;
  std::size_t size = 0;

  void free() { std::free(begin), begin = nullptr, size = 0; }
  ~Memory() { free(); }
};
thread_local Memory memory;

} // namespace

void advise_huge_pages(void *begin, std::size_t size) {
#ifdef MADV_HUGEPAGE
  madvise(begin, size, MADV_HUGEPAGE);
#else
  (void)begin, (void)size;
#endif
}

void *workspace(std::size_t size) {
  if (memory.size < size || (memory.size > kKept && size <= kKept)) {
    memory.free();
    const std::size_t whole = (size / kHugePage + 1) * kHugePage;
    if (posix_memalign(&memory.begin, kHugePage, whole))
      return memory.begin = nullptr;
    memory.size = whole;
    advise_huge_pages(memory.begin, whole);
  }
  return memory.begin;
}

} // namespace hrpose
