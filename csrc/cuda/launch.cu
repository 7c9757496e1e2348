// Device properties, errors and the names of launched kernels. The names are per thread: any thread may make calls.
#include <map>
#include <mutex>
#include <tuple>

#include "launch.h"

namespace xk::cuda {

namespace {
thread_local std::string launched;
}

void fail(const std::string& text) { throw Failure{XK_CUDA_ERROR, text}; }

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error: an unrelated call must not report it again
  fail(std::string(doing) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

const Device& use_device(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;  // a std::map: references to its elements stay valid
  check(cudaSetDevice(index), "choosing the device");
  std::lock_guard<std::mutex> lock(mutex);
  if (auto found = known.find(index); found != known.end()) return found->second;
  Device device = {};
  int major = 0, minor = 0;
  const char* doing = "asking what the device has";
  check(cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index), doing);
  check(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), doing);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), doing);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), doing);
  device.capability = 10 * major + minor;
  return known[index] = device;
}

void allow(Kernel kernel, int64_t shared_bytes, int cluster) {
  if (shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes),
          "asking for shared memory");
  if (cluster > 8)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "allowing clusters of 16 blocks");
}

bool can_cluster(Kernel kernel, int device, int cluster, int threads, int64_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, int, int, int64_t>, bool> known;
  std::lock_guard<std::mutex> lock(mutex);
  auto [found, is_new] = known.try_emplace({kernel, device, cluster, shared_bytes}, false);
  if (is_new) {
    allow(kernel, shared_bytes, cluster);
    cudaLaunchAttribute attribute = cluster_of(cluster);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)cluster);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    bool answered = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess;
    cudaGetLastError();  // an error means false: clears it, so that no unrelated call reports it
    found->second = answered && clusters > 0;
  }
  return found->second;
}

void note_launch(const char* name) {
  if (!launched.empty()) launched += ' ';
  launched += name;
}

void forget_launches() { launched.clear(); }

}  // namespace xk::cuda

extern "C" const char* xk_cuda_launched(void) { return xk::cuda::launched.c_str(); }
