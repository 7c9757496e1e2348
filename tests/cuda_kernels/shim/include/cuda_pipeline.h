// cp.async through the __pipeline_* functions.
#pragma once

#include <cuda_runtime.h>

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0,
                                    xk::emulation::Where where = xk::emulation::Where::current()) {
  xk::emulation::check_copy(to, from, size, zeros, where);
  unsigned char bytes[16] = {};
  memcpy(bytes, from, size - zeros);  // here, not in the runtime, for sanitizers to see it
  xk::emulation::copy_async(to, bytes, size);
}

inline void __pipeline_commit() { xk::emulation::commit_copies(); }
inline __attribute__((always_inline)) void __pipeline_wait_prior(int groups) { xk::emulation::wait_copies(groups); }
