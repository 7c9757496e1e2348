// Placeholder: one kernel, so that the build has something to build.
#include <cuda_runtime.h>

#include "cuda/api.h"

namespace xk::cuda {
namespace {

__global__ void fill_kernel(float* data, int64_t count, float value) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) data[i] = value;
}

}  // namespace

int fill(void* stream, float* data, int64_t count, float value) {
  if (count <= 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(256);
  config.gridDim = dim3((unsigned)((count + 255) / 256));
  config.stream = (cudaStream_t)stream;
  return cudaLaunchKernelEx(&config, fill_kernel, data, count, value);
}

}  // namespace xk::cuda
