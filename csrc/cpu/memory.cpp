#include "../include/xformer_kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

extern "C" void xk_prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), start = (uintptr_t(data) + page - 1) / page * page;
  const uintptr_t end = (uintptr_t(data) + uintptr_t(bytes)) / page * page;
  if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}
