// Loads maps into tiles in shared memory: converted to the element type, and scaled for fp16, which would lose small
// numbers otherwise.
#pragma once

#include <float.h>

#include <type_traits>

#include "../include/xformer_kernels.h"
#include "numbers.h"

namespace xk::cuda {

// A vector per (batch, head), of type T, or Sum<T> if `wide`.
struct Vector {
  const void* data;
  int64_t stride_b, stride_h, stride;
  int32_t wide;
  int32_t pieces;  // an element is the sum of this many numbers, `step` apart
  int64_t step;

  template <class T>
  __device__ Sum<T> get(int64_t b, int64_t h, int64_t i) const {
    int64_t at = b * stride_b + h * stride_h + i * stride;
    Sum<T> x = wide ? static_cast<const Sum<T>*>(data)[at] : widen(static_cast<const T*>(data)[at]);
    for (int piece = 1; piece < pieces; ++piece) x += static_cast<const Sum<T>*>(data)[at + piece * step];
    return x;
  }
};

// One number per head, of any dtype: temperature and its gradient.
struct PerHead {
  void* data;
  int64_t stride;
  int32_t dtype;  // an xk_dtype

  template <class S>
  __device__ S get(int64_t h) const {
    int64_t at = h * stride;
    if (dtype == XK_F64) return (S) static_cast<const double*>(data)[at];
    if (dtype == XK_BF16) return (S)widen(static_cast<const BFloat*>(data)[at]);
    if (dtype == XK_F16) return (S)widen(static_cast<const Half*>(data)[at]);
    return (S) static_cast<const float*>(data)[at];
  }
  template <class S>
  __device__ void set(int64_t h, S x) const {
    int64_t at = h * stride;
    if (dtype == XK_F64)
      static_cast<double*>(data)[at] = x;
    else if (dtype == XK_BF16)
      static_cast<BFloat*>(data)[at] = narrow<BFloat>((float)x);
    else if (dtype == XK_F16)
      static_cast<Half*>(data)[at] = narrow<Half>((float)x);
    else
      static_cast<float*>(data)[at] = (float)x;
  }
};

// A map from `features` input features to output features, with strides over both; of type T, or Sum<T> if `wide`.
struct Weight {
  const void* data;
  int64_t stride_b, stride_h, stride_in, stride_out;
  int32_t wide;
  int32_t features;

  template <class T>
  __device__ Sum<T> get(int64_t b, int64_t h, int in, int out) const {
    int64_t at = b * stride_b + h * stride_h + in * stride_in + out * stride_out;
    return wide ? static_cast<const Sum<T>*>(data)[at] : widen(static_cast<const T*>(data)[at]);
  }
};

// fp16 represents 2^-24 to 65504. Each column of a map is multiplied by a power of two that brings its largest number
// near the upper end, and the products are divided by it. Numbers that still underflow are negligible next to the
// largest.
template <class E>
constexpr bool kScaled = std::is_same_v<E, Half>;

__device__ inline float scale_into_fp16(float largest) {
  if (!(largest > 0) || largest > FLT_MAX) return 1;
  int exponent;
  frexpf(largest, &exponent);
  exponent = 14 - exponent;
  return ldexpf(1.0f, exponent > 126 ? 126 : exponent);
}

// Computes `up`, the factor of each column of a map, and `down`, the factor of its products, from largest(column). The
// caller must synchronise before reading them.
template <int kColumns, int kThreads, class Largest>
__device__ void scale_columns(Shared<float> up, Shared<float> down, Largest largest) {
#pragma unroll 1
  for (int c = (int)threadIdx.x; c < kColumns; c += kThreads) {
    up[c] = scale_into_fp16(largest(c));
    down[c] = 1 / up[c];
  }
}

// Loads rows [first, first + kDepth) of a map into a (kDepth, kColumns) tile in shared memory, with zeros beyond its
// features. `scale`: factor of each column, for fp16.
template <class T, class E, int kDepth, int kColumns, int kThreads, class Get>
__device__ void load_map(Shared<E> to, int features_in, int features_out, int first, bool columns_together,
                         Shared<Sum<E>> scale, Get get) {
  for (int x = (int)threadIdx.x; x < kDepth * kColumns; x += kThreads) {
    int row = columns_together ? x / kColumns : x % kDepth, column = columns_together ? x % kColumns : x / kDepth;
    Sum<E> value = 0;
    if (first + row < features_in && column < features_out) value = get(first + row, column);
    if constexpr (kScaled<E>) value *= scale[column];
    to[row * padded<E>(kColumns) + column] = narrow<E>(value);
  }
}

}  // namespace xk::cuda
