// Kernels that are right, and kernels that are wrong in one way each, for test_shim.py: `shim_cases NAME` launches one
// and prints its results as bits, or the report.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>
#include <stdio.h>
#include <sys/mman.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "portable.h"

namespace {

using namespace xk::cuda;
namespace wmma = nvcuda::wmma;

struct Shape {
  unsigned blocks = 1, threads = 64, cluster = 1;
  size_t shared = 4096;
};

template <class... P, class... A>
cudaError_t launch(Shape shape, void (*kernel)(P...), A... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = shape.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

std::vector<float> numbers(size_t n) {
  std::vector<float> x(n);
  for (size_t i = 0; i < n; ++i) x[i] = (float)((i * 37 + 11) % 101) / 16 - 3;
  return x;
}

cudaError_t show(cudaError_t error, const std::vector<float>& x) {
  if (error == cudaSuccess)
    for (float value : x) printf("%a ", value);
  return error;
}

// --- right -----------------------------------------------------------------------------------------------------------

__device__ float sum_of_warp(float x) {
  for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
  return x;
}

__global__ void __launch_bounds__(128) sum(const float* x, float* out, int n) {
  XK_ARENA(arena);
  Shared<float> partial = arena.take<float>(4);
  float mine = 0;
  for (int i = (int)(blockIdx.x * 128 + threadIdx.x); i < n; i += (int)gridDim.x * 128) mine += __ldg(x + i);
  mine = sum_of_warp(mine);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3];
}

cudaError_t run_sum() {
  const auto x = numbers(1000);
  std::vector<float> out(3);
  const cudaError_t error = launch({3, 128}, sum, x.data(), out.data(), 1000);
  double all = 0, expected = 0;
  for (float value : x) expected += value;
  for (float value : out) all += value;
  out.push_back(std::fabs(all - expected) < 1e-3 ? 1 : 0);
  return show(error, out);
}

__global__ void cluster_sum(const float* x, float* out) {
  XK_ARENA(arena);
  Shared<float> mine = arena.take<float>(64);
  mine[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  cluster_sync();
  float total = 0;
  for (int r = 0; r < cluster_size(); ++r) total += peer(mine, (r + cluster_rank()) % cluster_size())[63 - threadIdx.x];
  cluster_sync();
  out[blockIdx.x * 64 + threadIdx.x] = total;
}

cudaError_t run_cluster() {
  const auto x = numbers(8 * 64);
  std::vector<float> out(8 * 64);
  const cudaError_t error = launch({8, 64, 4}, cluster_sum, x.data(), out.data());
  bool right = true;
  for (int i = 0; i < 512; ++i) {
    float expected = 0;
    for (int r = 0; r < 4; ++r) expected += x[i / 256 * 256 + r * 64 + 63 - i % 64];
    right = right && out[i] == expected;
  }
  return show(error, {(float)right});
}

// C = A B of 32 x 64 x 32 with as many warps as tiles; A as it lies, B given by columns.
template <class T, int k>
__global__ void product(const typename wmma::storage<T>::type* a, const typename wmma::storage<T>::type* b, float* c) {
  XK_ARENA(arena);
  Shared<float> result = arena.take<float>(32 * 36);
  const int row = (int)threadIdx.x / 64 * 16, column = (int)threadIdx.x / 32 % 2 * 16;
  wmma::fragment<wmma::accumulator, 16, 16, k, float> sum;
  wmma::fill_fragment(sum, 0.f);
  for (int at = 0; at < 64; at += k) {
    wmma::fragment<wmma::matrix_a, 16, 16, k, T, wmma::row_major> left;
    wmma::fragment<wmma::matrix_b, 16, 16, k, T, wmma::col_major> right;
    wmma::load_matrix_sync(left, a + row * 64 + at, 64);
    wmma::load_matrix_sync(right, b + column * 64 + at, 64);
    if constexpr (std::is_same_v<T, wmma::precision::tf32>) {
      for (float& x : left.x) x = wmma::__float_to_tf32(x);
      for (float& x : right.x) x = wmma::__float_to_tf32(x);
    }
    wmma::mma_sync(sum, left, right, sum);
  }
  wmma::store_matrix_sync(&result[row * 36 + column], sum, 36, wmma::mem_row_major);
  __syncthreads();
  for (int i = (int)threadIdx.x; i < 1024; i += 128) c[i] = result[i / 32 * 36 + i % 32];
}

template <class T, int k>
cudaError_t run_product(std::function<typename wmma::storage<T>::type(float)> narrow) {
  struct alignas(32) Aligned {
    typename wmma::storage<T>::type x[32 * 64];
  };
  static Aligned a, b;
  const auto x = numbers(2 * 32 * 64);
  for (int i = 0; i < 32 * 64; ++i) a.x[i] = narrow(x[i]), b.x[i] = narrow(x[32 * 64 + i]);
  std::vector<float> c(1024);
  const cudaError_t error =
      launch({1, 128, 1, 8192}, product<T, k>, (decltype(&a.x[0]))a.x, (decltype(&a.x[0]))b.x, c.data());
  bool right = true;  // all products and sums of these numbers are exact
  for (int i = 0; i < 1024; ++i) {
    float expected = 0;
    for (int j = 0; j < 64; ++j) expected += x[i / 32 * 64 + j] * x[32 * 64 + i % 32 * 64 + j];
    right = right && c[i] == expected;
  }
  return show(error, {(float)right});
}

// Every thread sums what the others fetched, three buffers ahead.
__global__ void pipeline(const float* x, float* out, int steps) {
  XK_ARENA(arena);
  Shared<float> buffer = arena.take<float>(3 * 64);
  const auto fetch = [&](int step) {
    if (step < steps)
      __pipeline_memcpy_async(&buffer[step % 3 * 64 + threadIdx.x], x + step * 64 + threadIdx.x, 4,
                              threadIdx.x == 63 ? 4 : 0);
    __pipeline_commit();
  };
  fetch(0);
  fetch(1);
  float total = 0;
  for (int step = 0; step < steps; ++step) {
    __pipeline_wait_prior(1);
    __syncthreads();
    fetch(step + 2);
    total += buffer[step % 3 * 64 + 63 - threadIdx.x];
  }
  out[threadIdx.x] = total;
}

cudaError_t run_pipeline() {
  const auto x = numbers(10 * 64);
  std::vector<float> out(64);
  const cudaError_t error = launch({}, pipeline, x.data(), out.data(), 10);
  bool right = out[0] == 0;
  for (int i = 1; i < 64; ++i) {
    float expected = 0;
    for (int step = 0; step < 10; ++step) expected += x[step * 64 + 63 - i];
    right = right && out[i] == expected;
  }
  return show(error, {(float)right});
}

// --- wrong -----------------------------------------------------------------------------------------------------------

using Case = std::function<cudaError_t()>;

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

const std::map<std::string, Case> right = {
    {"sum", run_sum},
    {"cluster", run_cluster},
    {"pipeline", run_pipeline},
    {"bf16", [] { return run_product<__nv_bfloat16, 16>(__float2bfloat16_rn); }},
    {"fp16", [] { return run_product<__half, 16>(__float2half_rn); }},
    {"tf32", [] { return run_product<wmma::precision::tf32, 8>([](float x) { return x; }); }},
};

// Floats on stdin; each rounded to __half, to __nv_bfloat16 and to tf32 on stdout.
int convert() {
  for (float x; fread(&x, 4, 1, stdin);) {
    const float rounded[3] = {__half2float(__float2half_rn(x)), __bfloat162float(__float2bfloat16_rn(x)),
                              wmma::__float_to_tf32(x)};
    fwrite(rounded, 4, 3, stdout);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && !strcmp(argv[1], "convert")) return convert();
  for (int i = 1; i < argc; ++i) {
    Case run;
    for (const auto* cases : {&right, &barriers, &addresses, &operands, &launches, &races, &poisoned})
      if (const auto found = cases->find(argv[i]); found != cases->end()) run = found->second;
    const cudaError_t error = run();
    if (error != cudaSuccess) printf("%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
    printf("\n--\n");
    fflush(stdout);
  }
}
