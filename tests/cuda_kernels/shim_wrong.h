// Kernels and launches that are wrong in one way each, for shim_cases.cpp.
#pragma once

#include "shim_right.h"

namespace {

template <class... P, class... A>
Case one(Shape shape, void (*kernel)(P...), A... arguments) {
  return [=] { return launch(shape, kernel, arguments...); };
}

#define TAKE(name, T, count) \
  XK_ARENA(name##_arena);    \
  Shared<T> name = name##_arena.take<T>(count)

// What threads see of memory that was not written, or not yet: NaN.
Case reads(void (*kernel)(const float*, float*)) {
  return [=] {
    const auto x = numbers(64);
    std::vector<float> out(1);
    return show(launch({}, kernel, x.data(), out.data()), out);
  };
}

alignas(32) float memory[1024];
volatile int sink;

int deep(int n) {
  volatile char room[1024];
  room[n % 1024] = (char)n;
  return n ? deep(n - 1) + room[n % 1024] : 0;
}

float* before_a_guard_page() {
  auto* p = static_cast<char*>(mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(p + 4096, 4096, PROT_NONE);
  return reinterpret_cast<float*>(p + 4096) - 64;
}

template <class T>
using Left = wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major>;
using Sum = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

const std::map<std::string, Case> barriers = {
    {"divergent_barrier", one(
                              {},
                              +[] {
                                if (threadIdx.x < 40) __syncthreads();
                              })},
    {"mismatched_barrier", one(
                               {},
                               +[] {
                                 if (threadIdx.x < 40)
                                   __syncthreads();
                                 else
                                   __syncthreads();
                               })},
    {"barrier_in_warp_collective", one(
                                       {},
                                       +[] {
                                         if (threadIdx.x == 3) __syncthreads();
                                         __syncwarp();
                                       })},
    {"cluster_barrier", one(
                            {4, 64, 4},
                            +[] {
                              if (cluster_rank() != 2) cluster_sync();
                            })},
    {"lane_missing", one(
                         {},
                         +[] {
                           if (threadIdx.x == 37) return;
                           __shfl_xor_sync(~0u, 1.f, 1);
                         })},
    {"lane_elsewhere", one(
                           {},
                           +[] {
                             if (threadIdx.x == 5)
                               __shfl_sync(~0u, 1.f, 0);
                             else
                               __shfl_down_sync(~0u, 1.f, 1);
                           })},
    {"partial_mask", one(
                         {}, +[] { __syncwarp(0xffff); })},
};

const std::map<std::string, Case> addresses = {
    {"array", one(
                  {2},
                  +[] {
                    XK_ARENA(arena);
                    Shared<float> a = arena.take<float>(64);
                    Shared<float> b = arena.take<float>(64);
                    b[threadIdx.x] = 0;
                    a[threadIdx.x + blockIdx.x] = 0;
                  })},
    {"negative_index", one(
                           {},
                           +[] {
                             TAKE(a, float, 64);
                             (a + 3)[(int)threadIdx.x - 4] = 0;
                           })},
    {"arena", one(
                  {},
                  +[] {
                    TAKE(a, float, 1025);
                    a[0] = 0;
                  })},
    {"past_shared", one(
                        {},
                        +[] {
                          TAKE(a, float, 1024);
                          *(volatile float*)(&a[1023] + threadIdx.x) = 1;
                        })},
    {"before_shared", one(
                          {},
                          +[] {
                            TAKE(a, float, 1024);
                            *(volatile float*)(&a[0] - threadIdx.x) = 1;
                          })},
    {"rest_of_page", one(
                         {1, 64, 1, 3200},
                         +[] {
                           TAKE(a, float, 64);
                           *(volatile float*)(&a[0] - 1) = 1;
                         })},
    {"global",
     [] {
       return launch({2}, +[](float* p) { ((volatile float*)p)[blockIdx.x + threadIdx.x] = 1; }, before_a_guard_page());
     }},
    {"null", one(
                 {}, +[](float* p) { sink = (int)((volatile float*)p)[threadIdx.x]; }, (float*)nullptr)},
    {"stack", one(
                  {}, +[] { sink = deep(1000); })},
    {"peer_after_exit", one(
                            {2, 32, 2},
                            +[] {
                              TAKE(a, float, 32);
                              a[threadIdx.x] = 1;
                              cluster_sync();
                              sink =
                                  (int)peer(a, 1 - cluster_rank())[threadIdx.x];  // and no cluster_sync before the end
                            })},
    {"peer_rank", one(
                      {2, 32, 2},
                      +[] {
                        TAKE(a, float, 32);
                        sink = (int)peer(a, 2)[0];
                      })},
    {"unwritten", reads(+[](const float*, float* out) {
       TAKE(a, float, 64);
       out[0] = a[threadIdx.x];
     })},
    {"not_waited_for", reads(+[](const float* x, float* out) {
       TAKE(a, float, 64);
       __pipeline_memcpy_async(&a[threadIdx.x], x + threadIdx.x, 4);
       __pipeline_commit();
       __pipeline_memcpy_async(&a[threadIdx.x], x + threadIdx.x, 4);
       __pipeline_wait_prior(1);
       if (threadIdx.x == 63) out[0] = a[63];
       __syncthreads();
     })},
    {"fragment", reads(+[](const float*, float* out) {
       Sum sum;
       out[0] = sum.x[threadIdx.x % 8];
     })},
};

const std::map<std::string, Case> operands = {
    {"copy_alignment", one(
                           {},
                           +[] {
                             TAKE(a, float, 64);
                             __pipeline_memcpy_async(&a[1], memory, 16);
                           })},
    {"copy_source_alignment", one(
                                  {},
                                  +[] {
                                    TAKE(a, float, 64);
                                    __pipeline_memcpy_async(&a[0], memory + 1, 8);
                                  })},
    {"copy_size", one(
                      {},
                      +[] {
                        TAKE(a, float, 64);
                        __pipeline_memcpy_async(&a[0], memory, 12);
                      })},
    {"copy_bounds", one(
                        {},
                        +[] {
                          TAKE(a, float, 62);
                          __pipeline_memcpy_async(&a[60], memory, 16);
                        })},
    {"copy_to_global", one(
                           {}, +[] { __pipeline_memcpy_async(memory, memory + 4, 16); })},
    {"load_alignment", one(
                           {},
                           +[] {
                             Left<__half> left;
                             wmma::load_matrix_sync(left, (const __half*)memory + 8, 16);
                           })},
    {"load_stride", one(
                        {},
                        +[] {
                          Left<__nv_bfloat16> left;
                          wmma::load_matrix_sync(left, (const __nv_bfloat16*)memory, 20);
                        })},
    {"load_bounds", one(
                        {},
                        +[] {
                          XK_ARENA(arena);
                          Shared<__half> a = arena.take<__half>(15 * 24 + 15);
                          arena.take<__half>(64);
                          Left<__half> left;
                          wmma::load_matrix_sync(left, &a[0], 24);
                        })},
    {"store_bounds", one(
                         {},
                         +[] {
                           TAKE(a, float, 255);
                           Sum sum;
                           wmma::store_matrix_sync(&a[0], sum, 16, wmma::mem_col_major);
                         })},
    {"load_differs", one(
                         {},
                         +[] {
                           Left<__half> left;
                           wmma::load_matrix_sync(left, (const __half*)memory + threadIdx.x % 2 * 16, 16);
                         })},
    {"not_tf32", one(
                     {},
                     +[] {
                       wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, wmma::row_major> a;
                       wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, wmma::row_major> b;
                       wmma::fragment<wmma::accumulator, 16, 16, 8, float> sum;
                       wmma::fill_fragment(a, 1.f / 3);
                       wmma::fill_fragment(b, 1.f);
                       wmma::fill_fragment(sum, 0.f);
                       wmma::mma_sync(sum, a, b, sum);
                     })},
};

void nothing() {}
void nothing_large() {}
void nothing_clustered() {}

const std::map<std::string, Case> launches = {
    {"shared_48k", one({1, 32, 1, (48 << 10) + 1}, nothing)},
    {"shared_allowed",
     [] {
       cudaError_t error = cudaFuncSetAttribute(nothing_large, cudaFuncAttributeMaxDynamicSharedMemorySize, 99 << 10);
       return error == cudaSuccess ? launch({1, 32, 1, 99 << 10}, nothing_large) : error;
     }},
    {"shared_of_device",
     [] { return cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, (227 << 10) + 1); }},
    {"cluster_and_grid", one({6, 32, 4}, nothing)},
    {"cluster_9", one({9, 32, 9}, nothing)},
    {"cluster_16",
     [] {
       cudaFuncSetAttribute(nothing_clustered, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
       return launch({16, 32, 16}, nothing_clustered);
     }},
    {"cluster_2", one({4, 32, 2}, nothing)},
    {"threads", one({1, 2048}, nothing)},
    {"grid", one({0, 32}, nothing)},
};

// What ThreadSanitizer is for.
const std::map<std::string, Case> races = {
    {"no_barrier", reads(+[](const float* x, float* out) {
       TAKE(a, float, 64);
       a[threadIdx.x] = x[threadIdx.x];                        // no_barrier
       if (threadIdx.x == 0) out[0] = a[63] + a[threadIdx.x];  // no_barrier
     })},
    {"barrier_after_use", reads(+[](const float* x, float* out) {
       TAKE(a, float, 64);
       a[threadIdx.x] = x[threadIdx.x];
       __syncthreads();
       const float other = a[63 - threadIdx.x];  // barrier_after_use
       a[threadIdx.x] = other;                   // barrier_after_use
       __syncthreads();
       if (threadIdx.x == 0) out[0] = a[0];
     })},
    {"copy_without_barrier", reads(+[](const float* x, float* out) {
       TAKE(a, float, 64);
       __pipeline_memcpy_async(&a[threadIdx.x], x + threadIdx.x, 4);
       __pipeline_commit();
       __pipeline_wait_prior(0);              // copy_without_barrier
       if (threadIdx.x == 0) out[0] = a[63];  // copy_without_barrier
     })},
    {"between_blocks",
     [] {
       std::vector<float> out(64);
       return launch({2}, +[](float* out) { out[threadIdx.x ^ blockIdx.x] = 1; }, out.data());  // between_blocks
     }},
    {"shuffle_is_no_fence", reads(+[](const float* x, float* out) {
       TAKE(a, float, 64);
       a[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);  // shuffle_is_no_fence
       __shfl_xor_sync(~0u, 0, 1);
       if (threadIdx.x == 0) out[0] = a[31];  // shuffle_is_no_fence
     })},
};

// Under AddressSanitizer.
const std::map<std::string, Case> poisoned = {
    {"heap",
     [] {
       const std::vector<float> x(64);
       return launch({}, +[](const float* x) { sink = (int)x[threadIdx.x + 1]; }, x.data());
     }},
    {"copy_from_heap",
     [] {
       const std::vector<float> x(62);
       return launch(
           {},
           +[](const float* x) {
             TAKE(a, float, 64);
             if (threadIdx.x == 15) __pipeline_memcpy_async(&a[60], x + 60, 16);
           },
           x.data());
     }},
    {"between_arrays", one(
                           {},
                           +[] {
                             XK_ARENA(arena);
                             Shared<float> a = arena.take<float>(70);
                             arena.take<float>(70);
                             *(volatile float*)(&a[69] + 1) = 1;
                           })},
};

}  // namespace
