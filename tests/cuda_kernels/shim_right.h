// Kernels that are right, for shim_cases.cpp. Each is given numbers whose sums are exact, and says 1 if so was its
// result.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>
#include <stdio.h>
#include <sys/mman.h>

#include <atomic>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "fragments.h"

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

using Case = std::function<cudaError_t()>;

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

// The host, with no memory, lays arrays out as a kernel does.
__host__ __device__ Shared<float> lay_out(Arena& arena) {
  arena.take<float>(3);
  arena.take<double>(100);
  return arena.take<float>(32);
}

__global__ void use_layout(float* out) {
  XK_ARENA(arena);
  Shared<float> last = lay_out(arena), begin = last, end = last + 32;
  for (Shared<float> p = begin + (int)threadIdx.x; p < end; p += 32) *p = (float)(p - begin);
  if (threadIdx.x == 31) out[0] = (float)(end - 1)[0] + (float)(&last[0] - (float*)::xk::emulation::shared_base());
}

cudaError_t run_layout() {
  Arena arena(nullptr);
  lay_out(arena);
  std::vector<float> out(1);
  const cudaError_t error = launch({1, 32, 1, (size_t)arena.used()}, use_layout, out.data());
  return show(error, {out[0] == 31 + 256 && arena.used() == 1152 ? 1.f : 0.f});
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

// d = c + a b by one mma.sync. Where element i of an operand of a lane lies is written as in the PTX manual.
template <class T>
__global__ void product_of_registers(const float* a, const float* b, const float* c, float* d, bool swapped) {
  constexpr bool is_short = sizeof(T) == 2;
  constexpr int depth = is_short ? 16 : 8, in_word = is_short ? 2 : 1;
  const int group = (int)threadIdx.x / 4, in_group = (int)threadIdx.x % 4;
  uint32_t left[4] = {}, right[2] = {};
  auto put = [&](uint32_t* to, int i, float value) {
    if constexpr (is_short) {
      const T number = narrow<T>(value);
      to[i / 2] |= (uint32_t)number.bits << i % 2 * 16;
    } else {
      to[i] = __float_as_uint(value) | 0x1fff;  // what tf32 does not have is cut
    }
  };
  for (int i = 0; i < 4 * in_word; ++i) {
    int row, column;
    if (is_short) {
      row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    } else {
      row = i == 0 || i == 2 ? group : group + 8;
      column = i < 2 ? in_group : in_group + 4;
    }
    put(left, i, a[row * depth + column]);
  }
  for (int i = 0; i < 2 * in_word; ++i) {
    const int row = is_short ? in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0) : in_group + (i ? 4 : 0);
    put(right, i, b[row * 8 + group]);
  }
  if (swapped) std::swap(left[1], left[2]);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(group + (i < 2 ? 0 : 8)) * 8 + in_group * 2 + (i & 1)];
  mma<T>(sums, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) d[(group + (i < 2 ? 0 : 8)) * 8 + in_group * 2 + (i & 1)] = sums[i];
}

template <class T>
cudaError_t run_registers(bool swapped = false) {
  const int depth = sizeof(T) == 2 ? 16 : 8;
  const auto x = numbers(16 * depth + depth * 8 + 128);
  const float *a = x.data(), *b = a + 16 * depth, *c = b + depth * 8;
  std::vector<float> d(128);
  const cudaError_t error = launch({1, 32}, product_of_registers<T>, a, b, c, d.data(), swapped);
  bool right = true;  // all products and sums of these numbers are exact
  for (int i = 0; i < 128; ++i) {
    float expected = c[i];
    for (int k = 0; k < depth; ++k) expected += a[i / 8 * depth + k] * b[k * 8 + i % 8];
    right = right && d[i] == expected;
  }
  return show(error, {right != swapped ? 1.f : 0.f});
}

// One sum each: of 1 and 1.75 x 2^-23, of their negatives, of tf32's 1 in the place of 1 + 2^-11, and one that is too
// large.
__global__ void cut_off(float* d) {
  const float left[4] = {1.75f, -1.75f, 1 + 0x1p-11f, 0x1p127f}, right[4] = {0x1p-23f, 0x1p-23f, 1, 4},
              start[4] = {1, -1, 0, 0};
  for (int i = 0; i < 4; ++i) {
    const bool first = threadIdx.x == 0;
    const uint32_t a[4] = {first ? __float_as_uint(left[i]) : 0};
    float sums[4] = {start[i]};
    mma<float>(sums, a, first ? __float_as_uint(right[i]) : 0, 0);
    if (first) d[i] = sums[0];
  }
}

cudaError_t run_cut_off() {
  std::vector<float> d(4);
  const cudaError_t error = launch({1, 32}, cut_off, d.data());
  return show(error, d);
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

// From several threads of the host, one of which has a kernel that fails.
cudaError_t run_concurrent() {
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([t, &wrong] {
      const auto x = numbers(1000);
      std::vector<float> out(2);
      for (int i = 0; i < 20; ++i) {
        const cudaError_t error = launch({1, 128, 1, t ? 4096u : 0}, sum, x.data(), &out[i % 2], 1000);
        if ((error == cudaSuccess) != (t != 0) || cudaGetLastError() != error || (i && out[0] != out[1])) ++wrong;
        if (!t && !strstr(cudaGetErrorString(error), "an array of 16 bytes")) ++wrong;
      }
    });
  for (auto& thread : threads) thread.join();
  return show(cudaSuccess, {wrong ? 0.f : 1.f});
}

const std::map<std::string, Case> right = {
    {"sum", run_sum},
    {"layout", run_layout},
    {"cluster", run_cluster},
    {"concurrent", run_concurrent},
    {"pipeline", run_pipeline},
    {"bf16", [] { return run_product<__nv_bfloat16, 16>(__float2bfloat16_rn); }},
    {"fp16", [] { return run_product<__half, 16>(__float2half_rn); }},
    {"cut_off", run_cut_off},
    {"registers_bf16", [] { return run_registers<__nv_bfloat16>(); }},
    {"registers_fp16", [] { return run_registers<__half>(); }},
    {"registers_tf32", [] { return run_registers<float>(); }},
    {"registers_swapped", [] { return run_registers<__half>(true); }},
    {"tf32", [] { return run_product<wmma::precision::tf32, 8>([](float x) { return x; }); }},
};

}  // namespace
