// What the CUDA module does, for bindings.cpp and whoever else has pointers and a stream. Placeholder.
#pragma once

#include <stdint.h>

namespace xk::cuda {

// Writes `value` to the `count` floats at `data`, a device pointer; a cudaError_t.
int fill(void* stream, float* data, int64_t count, float value);

}  // namespace xk::cuda
