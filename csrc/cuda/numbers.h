// Dtypes of tokens and how they are multiplied.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "portable.h"

namespace xk::cuda {

using Half = __half;
using BFloat = __nv_bfloat16;

template <class T>
struct Numbers {  // T: type of tokens; Sum: type of sums, norms and maps
  using Sum = float;
};
template <>
struct Numbers<double> {
  using Sum = double;
};
template <class T>
using Sum = typename Numbers<T>::Sum;

template <class T>
constexpr int kVector = 16 / (int)sizeof(T);  // numbers in 16 bytes

__device__ inline float widen(Half x) { return __half2float(x); }
__device__ inline float widen(BFloat x) { return __bfloat162float(x); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

template <class T>
__device__ T narrow(Sum<T> x);
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
template <>
__device__ inline double narrow<double>(double x) {
  return x;
}

// max(norm, eps); NaN stays NaN.
template <class S>
__device__ S clamp_norm(S norm, S eps) {
  return norm < eps ? eps : norm;
}

// Sum over the lanes of a warp, returned to every lane.
template <class S>
__device__ S warp_sum(S x) {
  for (int step = 16; step > 0; step /= 2) {
    S other = __shfl_xor_sync(0xffffffffu, x, step);
    XK_STEP(shuffle, x += other);
  }
  return x;
}

// How tiles in shared memory are multiplied. Element: element type of the tiles. Accumulators are of type Sum<Element>.
template <class T>
struct Fma {  // float, double: fused multiply-adds with IEEE 754 rounding
  using Element = T;
};
template <class T>
struct TensorCore {  // Half, BFloat
  using Element = T;
};
struct Tf32 {  // float with the mantissa reduced to 10 bits
  using Element = float;
};

template <class Math>
using Element = typename Math::Element;

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
