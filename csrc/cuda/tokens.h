// Tokens of one (batch, head) between global and shared memory.
#pragma once

#include <cuda_pipeline.h>

#include "numbers.h"

namespace xk::cuda {

// A (batch, heads, tokens, features) tensor; strides are in numbers and of any sign. `vector`: the bytes, 16, 8 or 4,
// that may be copied at once since every token starts and ends at a multiple of them; 0 if there is no such number.
struct Operand {
  const void* data;
  int64_t stride_b, stride_h, stride_n, stride_d;
  int32_t features, vector;

  template <class T>
  __device__ const T* head(int64_t b, int64_t h) const {
    return static_cast<const T*>(data) + b * stride_b + h * stride_h;
  }
};

// Which tokens take part: (batch, tokens), or all if data is null.
struct Mask {
  const uint8_t* data;
  int64_t stride_b, stride_n;

  __device__ bool keeps(int64_t b, int64_t n) const { return !data || data[b * stride_b + n * stride_n] != 0; }
};

// The tokens [begin, begin + rows) of (b, h), of which those from `end` on are not there.
struct Rows {
  int64_t b, h, begin, end;
  int rows;

  __device__ bool kept(const Mask& mask, int row) const {
    bool inside = true;
    XK_STEP(tail_mask, inside = begin + row < end);
    return inside && mask.keeps(b, begin + row);
  }
};

__host__ __device__ constexpr int power_of_two_from(int least) {
  int x = 1;
  while (x < least) x *= 2;
  return x;
}

// Features [first, first + kColumns) of tokens into rows of padded<E>(kColumns) numbers: 0 for tokens that take no
// part. Columns beyond the features are not written: see clear_columns. Asynchronous where E is T and the memory allows
// it; the caller commits and waits.
template <class T, class E, int kColumns, int kThreads>
__device__ void load_tile(Shared<E> tile, const Operand& x, int first, const Rows& r, const Mask& mask) {
  const T* base = x.head<T>(r.b, r.h);
  int count = x.features - first < kColumns ? x.features - first : kColumns;
  if constexpr (sizeof(T) == sizeof(E)) {
    if (x.vector) {
      constexpr int kWanted = power_of_two_from(kColumns / kVector<T>), kLanes = kWanted < 32 ? kWanted : 32;
      int numbers = x.vector / (int)sizeof(T);
      for (int row = (int)threadIdx.x / kLanes; row < r.rows; row += kThreads / kLanes) {
        bool keep = r.kept(mask, row);
        const T* from = base + (keep ? (r.begin + row) * x.stride_n : 0) + first;
        for (int c = (int)threadIdx.x % kLanes * numbers; c < count; c += kLanes * numbers) {
          T* to = &tile[row * padded<E>(kColumns) + c];
          if (x.vector == 16)
            __pipeline_memcpy_async(to, from + c, 16, keep ? 0 : 16);
          else if (x.vector == 8)
            __pipeline_memcpy_async(to, from + c, 8, keep ? 0 : 8);
          else
            __pipeline_memcpy_async(to, from + c, 4, keep ? 0 : 4);
        }
      }
      return;
    }
  }
  for (int row = (int)threadIdx.x / 32; row < r.rows; row += kThreads / 32) {
    bool keep = r.kept(mask, row);
    const T* from = base + (keep ? (r.begin + row) * x.stride_n : 0) + first * x.stride_d;
    for (int c = (int)threadIdx.x % 32; c < count; c += 32)
      tile[row * padded<E>(kColumns) + c] = narrow<E>(keep ? widen(from[c * x.stride_d]) : 0);
  }
}

// Zeros from column `features` on: products take them for features.
template <class E, int kColumns, int kThreads>
__device__ void clear_columns(Shared<E> tile, int features, int rows) {
#pragma unroll 1
  for (int row = (int)threadIdx.x / 32; row < rows; row += kThreads / 32)
#pragma unroll 1
    for (int c = features + (int)threadIdx.x % 32; c < kColumns; c += 32)
      XK_STEP(column_mask, tile[row * padded<E>(kColumns) + c] = narrow<E>(0));
}

// norms[row] = |x[n,:]| over the features, infinite for tokens that take no part: they give 0 divided by it. All
// features are read from global memory, since a tile may hold only some of them.
template <class T, int kThreads>
__device__ void row_norms(Shared<Sum<T>> norms, const Operand& x, const Rows& r, const Mask& mask) {
  const T* base = x.head<T>(r.b, r.h);
  for (int row = (int)threadIdx.x / 32; row < r.rows; row += kThreads / 32) {
    bool keep = r.kept(mask, row);
    const T* from = base + (keep ? (r.begin + row) * x.stride_n : 0);
    Sum<T> sum = 0;
    if (keep)
      for (int c = (int)threadIdx.x % 32; c < x.features; c += 32) {
        Sum<T> y = widen(from[c * x.stride_d]);
        sum += y * y;
      }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) norms[row] = keep ? sqrt(sum) : Sum<T>(INFINITY);
  }
}

// Sums of squares of the columns of tiles, over all tiles that were added. A thread owns the columns of one 32-bit word
// (a number of 64 bits) and every kGroups-th row; sums of a tile are added to those before: two short sums are more
// accurate than a long one.
template <class E, int kColumns, int kThreads>
class Squares {
  static constexpr int kTogether = sizeof(E) == 2 ? 2 : 1, kWords = kColumns / kTogether;
  static constexpr int kOwners = kWords < kThreads ? kWords : kThreads, kGroups = kThreads / kOwners;
  static_assert(kWords <= kThreads);

 public:
  static constexpr int kScratch = kGroups * kColumns;

  __device__ void add(Shared<E> tile, int rows) {
    if (group() >= kGroups) return;
    Sum<E> now[kTogether] = {};
    for (int row = group(); row < rows; row += kGroups)
      for (int i = 0; i < kTogether; ++i) {
        Sum<E> x = widen(tile[row * padded<E>(kColumns) + column() + i]);
        now[i] += x * x;
      }
    for (int i = 0; i < kTogether; ++i) sum_[i] += now[i];
  }

  // out[c] for the first `count` columns; scratch: kScratch numbers. All threads take part.
  template <class Out>
  __device__ void store(Out out, int count, Shared<Sum<E>> scratch) {
    if (group() < kGroups)
      for (int i = 0; i < kTogether; ++i) scratch[group() * kColumns + column() + i] = sum_[i];
    __syncthreads();  // every group's sums are there
#pragma unroll 1
    for (int c = (int)threadIdx.x; c < count; c += kThreads) {
      Sum<E> total = scratch[c];
#pragma unroll 1
      for (int g = 1; g < kGroups; ++g) total += scratch[g * kColumns + c];
      out[c] = total;
    }
    __syncthreads();  // scratch is free again
  }

 private:
  Sum<E> sum_[kTogether] = {};
  __device__ static int group() { return (int)threadIdx.x / kOwners; }
  __device__ static int column() { return (int)threadIdx.x % kOwners * kTogether; }
};

// Where results go: features are next to each other; `wide` if 16 bytes of them may be written at once.
template <class T>
struct Result {
  T* data;
  int64_t stride_b, stride_h, stride_n;
  int32_t features, wide;

  __device__ T* token(int64_t b, int64_t h, int64_t n) const {
    return data + b * stride_b + h * stride_h + n * stride_n;
  }
};

// Writes value(row, column) for the tokens that are there, 16 bytes at a time where tokens start at multiples of them.
template <class T, int kColumns, int kThreads, class Value>
__device__ void store_rows(const Result<T>& to, const Rows& r, Value value) {
  constexpr int kNumbers = kVector<T>;
  constexpr int kLanes = power_of_two_from(kColumns / kNumbers) < 32 ? power_of_two_from(kColumns / kNumbers) : 32;
  for (int row = (int)threadIdx.x / kLanes; row < r.rows; row += kThreads / kLanes) {
    if (r.begin + row >= r.end) break;
    T* token = to.token(r.b, r.h, r.begin + row);
    if (to.wide) {
      for (int c = (int)threadIdx.x % kLanes * kNumbers; c < to.features; c += kLanes * kNumbers) {
        alignas(16) T numbers[kNumbers];
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) numbers[i] = narrow<T>(value(row, c + i));
        *reinterpret_cast<uint4*>(token + c) = *reinterpret_cast<const uint4*>(numbers);
      }
    } else {
      for (int c = (int)threadIdx.x % kLanes; c < to.features; c += kLanes) token[c] = narrow<T>(value(row, c));
    }
  }
}

}  // namespace xk::cuda
