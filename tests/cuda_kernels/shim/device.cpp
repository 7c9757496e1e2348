// The host's side: what the emulated device is, and whether a launch is possible on it.
#include <stdio.h>
#include <stdlib.h>

#include <mutex>
#include <unordered_map>

#include "runtime.h"

namespace xk::emulation {
namespace {

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t set(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

struct Device {
  int major = 9, minor = 0;
  int shared_per_block() const {
    if (major == 9 || major == 10 || major == 11) return 227 << 10;
    return major == 8 && (minor == 0 || minor == 7) ? 163 << 10 : 99 << 10;
  }
  int largest_cluster() const { return major < 9 ? 1 : major < 12 ? 16 : 8; }
};

Device device() {
  Device device;
  const char* text = getenv("XK_EMULATION_DEVICE");
  if (text && sscanf(text, "%d.%d", &device.major, &device.minor) != 2)
    fprintf(stderr, "emulation: XK_EMULATION_DEVICE is '%s', not major.minor\n", text), abort();
  return device;
}

struct Function {
  int dynamic_shared = 48 << 10;
  bool any_cluster = false;
};

std::mutex functions_lock;
std::unordered_map<const void*, Function> functions;

Function function_of(const void* kernel) {
  const std::lock_guard<std::mutex> lock(functions_lock);
  return functions[kernel];
}

dim3 cluster_of(const cudaLaunchConfig_t& config) {
  dim3 shape;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& d = config.attrs[i].val.clusterDim;
      shape = dim3(d.x, d.y, d.z);
    }
  return shape;
}

uint64_t volume(dim3 d) { return (uint64_t)d.x * d.y * d.z; }

cudaError_t refuse(cudaError_t error, const char* why) {
  snprintf(report, sizeof report, "%s", why);
  return error;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const Function function = function_of(kernel);
  const dim3 grid = config.gridDim, block = config.blockDim, cluster = cluster_of(config);
  report[0] = 0;
  if (!kernel) return refuse(cudaErrorInvalidDeviceFunction, "no kernel");
  if (!volume(block) || volume(block) > kMaxThreads || !volume(grid) || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, "sizes of the grid or the block out of range");
  if (block.y != 1 || block.z != 1 || block.x % 32)
    return refuse(cudaErrorNotSupported, "only blocks of full warps in one dimension are emulated");
  if (config.dynamicSmemBytes > (size_t)device().shared_per_block())
    return refuse(cudaErrorInvalidValue, "more dynamic shared memory than the device has");
  if (config.dynamicSmemBytes > (size_t)function.dynamic_shared)
    return refuse(cudaErrorInvalidValue,
                  "more dynamic shared memory than cudaFuncAttributeMaxDynamicSharedMemorySize allows");
  const uint64_t blocks = volume(cluster);
  if (!blocks || blocks > (uint64_t)device().largest_cluster())
    return refuse(cudaErrorInvalidClusterSize, "a cluster larger than the device's");
  if (blocks > 8 && !function.any_cluster)
    return refuse(cudaErrorInvalidClusterSize,
                  "a cluster of more than 8 without cudaFuncAttributeNonPortableClusterSizeAllowed");
  if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z)
    return refuse(cudaErrorInvalidClusterSize, "the grid is not a multiple of the cluster");
  return cudaSuccess;
}

}  // namespace

int launch(const cudaLaunchConfig_st* config, const void* kernel, void (*call)(void*), void* arguments) {
  const cudaError_t error = check(*config, kernel);
  if (error != cudaSuccess) return set(error);
  Launch launch{call,
                arguments,
                (int)config->blockDim.x,
                0,
                cluster_of(*config),
                config->dynamicSmemBytes,
                config->gridDim,
                config->blockDim};
  launch.cluster = (int)volume(launch.cluster_shape);
  return set(run(launch) ? cudaSuccess : cudaErrorLaunchFailure);
}

}  // namespace xk::emulation

using namespace xk::emulation;

const char* cudaGetErrorName(cudaError_t error) {
#define NAME(name) \
  case name:       \
    return #name
  switch (error) {
    NAME(cudaSuccess);
    NAME(cudaErrorInvalidValue);
    NAME(cudaErrorInvalidConfiguration);
    NAME(cudaErrorInvalidDeviceFunction);
    NAME(cudaErrorInvalidDevice);
    NAME(cudaErrorLaunchFailure);
    NAME(cudaErrorNotSupported);
    NAME(cudaErrorInvalidClusterSize);
  }
#undef NAME
  return "unknown error";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error != cudaSuccess && report[0] ? report : cudaGetErrorName(error);
}

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return set(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index != 0) return set(cudaErrorInvalidDevice);
  const Device d = device();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = 4, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = d.major, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = d.minor, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return *value = d.shared_per_block() + 1024, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = d.shared_per_block(), cudaSuccess;
  }
  return set(cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > device().shared_per_block())
      return set(refuse(cudaErrorInvalidValue, "more dynamic shared memory than the device has"));
    const std::lock_guard<std::mutex> lock(functions_lock);
    functions[kernel].dynamic_shared = value;
  } else {
    const std::lock_guard<std::mutex> lock(functions_lock);
    functions[kernel].any_cluster = value != 0;
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  *clusters = 0;
  if (device().major < 9) return cudaSuccess;
  const cudaError_t error = check(*config, kernel);
  if (error != cudaSuccess) return set(error);
  *clusters = std::max(1, 4 / (int)volume(cluster_of(*config)));
  return cudaSuccess;
}
