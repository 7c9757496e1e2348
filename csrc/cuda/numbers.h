// Dtypes of tokens. Sums, norms and maps are float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "portable.h"

namespace xk::cuda {

using Half = __half;
using BFloat = __nv_bfloat16;

template <class T>
constexpr int kVector = 16 / (int)sizeof(T);  // numbers in 16 bytes

__device__ inline float widen(Half x) { return __half2float(x); }
__device__ inline float widen(BFloat x) { return __bfloat162float(x); }
__device__ inline float widen(float x) { return x; }

template <class T>
__device__ T narrow(float x);
template <>
__device__ inline Half narrow<Half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline BFloat narrow<BFloat>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}

// max(norm, eps); NaN stays NaN.
__device__ inline float clamp_norm(float norm, float eps) { return norm < eps ? eps : norm; }

// Sum over the lanes of a warp, returned to every lane.
__device__ inline float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) {
    float other = __shfl_xor_sync(0xffffffffu, x, step);
    XK_STEP(shuffle, x += other);
  }
  return x;
}

// Rows of tiles in shared memory are padded by 16 bytes, to put consecutive rows in different banks.
template <class T>
__host__ __device__ constexpr int padded(int columns) {
  return columns + kVector<T>;
}

template <class Word, int kCount, class N>
__device__ void copy_words(N* to, const N* from) {
#pragma unroll
  for (int i = 0; i < kCount * (int)sizeof(N) / (int)sizeof(Word); ++i)
    reinterpret_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(from)[i];
}

// Copies kCount contiguous numbers with vector accesses. `from` and `to` must be aligned to the size of the copy or to
// 16 bytes.
template <int kCount, class N>
__device__ void load_numbers(N* to, const N* from) {
  constexpr int kBytes = kCount * (int)sizeof(N);
  if constexpr (kBytes % 16 == 0)
    copy_words<uint4, kCount>(to, from);
  else if constexpr (kBytes % 8 == 0)
    copy_words<uint2, kCount>(to, from);
  else if constexpr (kBytes % 4 == 0)
    copy_words<uint32_t, kCount>(to, from);
  else
    copy_words<N, kCount>(to, from);
}

__host__ __device__ constexpr int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace xk::cuda
