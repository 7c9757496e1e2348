// Loads maps into tiles in shared memory: converted to the element type, and scaled for fp16, which would lose small
// numbers otherwise.
#pragma once

#include <float.h>

#include <type_traits>

#include "../include/xformer_kernels.h"
#include "numbers.h"

namespace xk::cuda {

// One number per head, of any dtype but fp64: temperature and its gradient.
struct PerHead {
  void* data;
  int64_t stride;
  int32_t dtype;  // an xk_dtype

  __device__ float get(int64_t h) const {
    int64_t at = h * stride;
    if (dtype == XK_BF16) return widen(static_cast<const BFloat*>(data)[at]);
    if (dtype == XK_F16) return widen(static_cast<const Half*>(data)[at]);
    return static_cast<const float*>(data)[at];
  }
  __device__ void set(int64_t h, float x) const {
    int64_t at = h * stride;
    if (dtype == XK_BF16)
      static_cast<BFloat*>(data)[at] = narrow<BFloat>(x);
    else if (dtype == XK_F16)
      static_cast<Half*>(data)[at] = narrow<Half>(x);
    else
      static_cast<float*>(data)[at] = x;
  }
};

// fp16 represents 2^-24 to 65504. Each column of a map is multiplied by a power of two that brings its largest number
// near the upper end, and the products are divided by it. Numbers that still underflow are negligible next to the
// largest.
template <class T>
constexpr bool kScaled = std::is_same_v<T, Half>;

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

// Loads a map of dim x dim into a (kColumns, kColumns) tile in shared memory, with zeros beyond. `scale`: factor of
// each column, for fp16.
template <class T, int kColumns, int kThreads, class Get>
__device__ void load_map(Shared<T> to, int dim, bool columns_together, Shared<float> scale, Get get) {
  for (int x = (int)threadIdx.x; x < kColumns * kColumns; x += kThreads) {
    int major = x / kColumns, minor = x % kColumns;
    int row = columns_together ? major : minor, column = columns_together ? minor : major;
    float value = row < dim && column < dim ? get(row, column) : 0.f;
    if constexpr (kScaled<T>) value *= scale[column];
    to[row * padded<T>(kColumns) + column] = narrow<T>(value);
  }
}

}  // namespace xk::cuda
