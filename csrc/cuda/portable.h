// Abstractions that differ between CUDA and the CPU emulation of the tests: shared memory, clusters and fault
// injection. Kernels are otherwise plain CUDA. The emulation (tests/cuda_kernels/shim) defines the same names in
// emulation.h.
//
//   Shared<T>            a pointer into shared memory; supports [i] and + offset. &p[i] is a T*.
//   Arena                bump allocator over the block's dynamic shared memory: Shared<T> a = arena.take<T>(count).
//                        On the host, with a null base, it computes the size of a layout.
//   XK_ARENA(name)       an Arena over this block's dynamic shared memory, in a kernel
//   cluster_rank(), cluster_size(), cluster_sync(), peer(p, rank)
//                        rank of this block in its cluster, size of the cluster, cluster barrier; the address of p
//                        in the shared memory of block `rank` of the cluster
//   XK_STEP(fault, ...)  a statement that tests remove to inject a fault: at compile time with -DXK_PLANTED=fault, or,
//                        with -DXK_PLANTED_AT_RUN_TIME, at each launch as the emulation decides
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace xk::cuda {

enum class Fault { none, barrier, tail_mask, column_mask, shuffle, cluster_barrier };
#ifndef XK_PLANTED
#define XK_PLANTED none
#endif
constexpr Fault kPlanted = Fault::XK_PLANTED;
#ifdef XK_PLANTED_AT_RUN_TIME
#define XK_STEP(fault, ...)                                          \
  do {                                                               \
    static_assert(::xk::cuda::Fault::fault != ::xk::cuda::kPlanted); \
    if (!::xk::emulation::is_planted(#fault)) __VA_ARGS__;           \
  } while (0)
#else
#define XK_STEP(fault, ...)                                                      \
  do {                                                                           \
    if constexpr (::xk::cuda::kPlanted != ::xk::cuda::Fault::fault) __VA_ARGS__; \
  } while (0)
#endif

}  // namespace xk::cuda

#ifdef XK_EMULATED
#include "emulation.h"
#else

namespace xk::cuda {

template <class T>
using Shared = T*;

constexpr int kSharedAlignment = 128;

class Arena {
 public:
  __host__ __device__ explicit Arena(unsigned char* base) : base_(base) {}
  template <class T>
  __host__ __device__ Shared<T> take(int64_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * (int64_t)sizeof(T) + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    return p;
  }
  __host__ __device__ int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

#define XK_ARENA(name)                                                \
  extern __shared__ __align__(128) unsigned char xk_dynamic_shared[]; \
  ::xk::cuda::Arena name(xk_dynamic_shared)

// Cluster operations in inline PTX: cooperative_groups.h takes longer to compile than all kernels of a dtype. Below
// sm_90 there are no clusters: each block acts as a cluster of size 1.
__device__ inline int cluster_rank() {
  int rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ inline int cluster_size() {
  int size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  // not .aligned: the threads of a warp may be diverged
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

template <class T>
__device__ inline T* peer(T* p, int rank) {
#if __CUDA_ARCH__ >= 900
  T* theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(p), "r"(rank));
  return theirs;
#else
  (void)rank;
  return p;
#endif
}

}  // namespace xk::cuda
#endif
