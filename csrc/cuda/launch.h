// Host side: device properties, kernel launches, and errors.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <string>

#include "../include/xformer_kernels.h"

namespace xk::cuda {

// Thrown inside the library and caught in the functions of the C API.
struct Failure {
  int status;
  std::string text;
};

[[noreturn]] void fail(const std::string& text);
void check(cudaError_t error, const char* doing);

struct Device {
  int processors, shared_bytes, capability;  // capability: 10 * major + minor
};

// Makes the device current in this thread and returns its properties.
const Device& use_device(int index);

// Records the name of a launched kernel for xk_cuda_launched.
void note_launch(const char* name);

inline cudaLaunchAttribute cluster_of(int blocks) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = (unsigned)blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

using Kernel = const void*;  // address of a kernel

// Sets the kernel's attributes for this much dynamic shared memory and clusters of this size.
void allow(Kernel kernel, int64_t shared_bytes, int cluster);

// Whether the current device can run clusters of this size; the result is cached.
bool can_cluster(Kernel kernel, int device, int cluster, int threads, int64_t shared_bytes);

template <class Args>
void launch(const char* name, void (*kernel)(Args), const Args& args, int64_t blocks, int threads, int64_t shared_bytes,
            void* stream, int cluster = 1) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) fail(std::string(name) + ": more than 2^31 blocks");
  allow(reinterpret_cast<Kernel>(kernel), shared_bytes, cluster);
  cudaLaunchAttribute attribute = cluster_of(cluster);
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
