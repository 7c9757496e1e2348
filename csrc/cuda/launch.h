// Host side: what a device has, launches, and errors with their text.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <string>

#include "../include/xformer_kernels.h"

namespace xk::cuda {

// Thrown inside the library, and caught where the C API begins.
struct Failure {
  int status;
  std::string text;
};

[[noreturn]] void fail(const std::string& text);
void check(cudaError_t error, const char* doing);

struct Device {
  int processors, shared_bytes, capability;  // 10 * major + minor
};

// Makes it the current device of this thread.
const Device& use_device(int index);

// Notes that the kernel runs, for xk_cuda_launched.
void note_launch(const char* name);

// Whether the device can run so many blocks of so much shared memory as a cluster.
template <class Args>
bool can_cluster(void (*kernel)(Args), int cluster, int threads, int64_t shared_bytes) {
  if (cluster > 8)
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "allowing clusters of 16 blocks");
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)shared_bytes),
        "asking for shared memory");
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = (unsigned)cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)cluster);
  config.blockDim = dim3((unsigned)threads);
  config.dynamicSmemBytes = (size_t)shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // an answer of its own kind: such clusters are not possible
    return false;
  }
  return clusters > 0;
}

template <class Args>
void launch(const char* name, void (*kernel)(Args), const Args& args, int64_t blocks, int threads, int64_t shared_bytes,
            void* stream, int cluster = 1) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) fail(std::string(name) + ": more than 2^31 blocks");
  if (shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               (int)shared_bytes),
          "asking for shared memory");
  if (cluster > 8)
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "allowing clusters of 16 blocks");
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = (unsigned)cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)blocks);
  config.blockDim = dim3((unsigned)threads);
  config.dynamicSmemBytes = (size_t)shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args), name);
  note_launch(name);
}

}  // namespace xk::cuda
