// The part of CUDA that the kernels use, for g++ and CPU memory.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "emulation_runtime.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

// clang-format off
struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(16) double2 { double x, y; };
struct __align__(16) int4 { int x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
// clang-format on

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned nx = 1, unsigned ny = 1, unsigned nz = 1) : x(nx), y(ny), z(nz) {}
};

// Of the thread that runs: plain variables, as one thread runs at a time.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};
const char* cudaGetErrorString(cudaError_t);
const char* cudaGetErrorName(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

using cudaStream_t = struct CUstream_st*;
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_st {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
using cudaLaunchConfig_t = cudaLaunchConfig_st;

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config);

template <class R, class... P>
cudaError_t cudaFuncSetAttribute(R (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class R, class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, R (*kernel)(P...), const cudaLaunchConfig_t* config) {
  return cudaOccupancyMaxActiveClusters(clusters, reinterpret_cast<const void*>(kernel), config);
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  using Arguments = std::tuple<void (*)(P...), std::remove_cv_t<P>...>;
  Arguments all(kernel, std::forward<A>(arguments)...);
  auto call = [](void* all) {
    std::apply([](auto kernel, const auto&... arguments) { kernel(arguments...); }, *static_cast<Arguments*>(all));
  };
  return (cudaError_t)xk::emulation::launch(config, reinterpret_cast<const void*>(kernel), call, &all);
}

inline void __syncthreads(xk::emulation::Where where = xk::emulation::Where::current()) {
  xk::emulation::block_barrier(where);
}

inline void __syncwarp(unsigned mask = ~0u, xk::emulation::Where where = xk::emulation::Where::current()) {
  xk::emulation::sync_warp(mask, where);
}

namespace xk::emulation {

template <class T>
T shuffle_value(const char* what, unsigned mask, T value, int source, Where where) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(what, mask, bits, source, where);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// `source` is a lane of the segment of `width` lanes; past its end a lane gets its own value.
inline int shuffle_source(int lane, int source, int width) { return source < (lane & -width) + width ? source : lane; }

inline int lane() { return (int)threadIdx.x & 31; }

}  // namespace xk::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              xk::emulation::Where where = xk::emulation::Where::current()) {
  source = (xk::emulation::lane() & -width) + (source & (width - 1));
  return xk::emulation::shuffle_value("__shfl_sync", mask, value, source, where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = warpSize,
                  xk::emulation::Where where = xk::emulation::Where::current()) {
  const int lane = xk::emulation::lane();
  const int source = xk::emulation::shuffle_source(lane, lane ^ with, width);
  return xk::emulation::shuffle_value("__shfl_xor_sync", mask, value, source, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize,
                   xk::emulation::Where where = xk::emulation::Where::current()) {
  const int lane = xk::emulation::lane();
  const int source = xk::emulation::shuffle_source(lane, lane + (int)by, width);
  return xk::emulation::shuffle_value("__shfl_down_sync", mask, value, source, where);
}

template <class T>
T __ldg(const T* p) {
  return *p;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// Four of the eight bytes of low and high, which the digits of `which` number.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t bytes = (uint64_t)high << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= (uint32_t)(bytes >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
