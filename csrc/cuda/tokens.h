// Loads and stores of the tokens of one (batch, head) between global and shared memory.
#pragma once

#include <cuda_pipeline.h>

#include <type_traits>

#include "numbers.h"

namespace xk::cuda {

// A (batch, heads, tokens, features) tensor; strides are in elements and may be negative. `vector`: bytes per vector
// access, 16, 8 or 4, to which the start and end of every token are aligned; 0 if there is no such alignment.
struct Operand {
  const void* data;
  int64_t stride_b, stride_h, stride_n, stride_d;
  int32_t features, vector;

  template <class T>
  __device__ const T* head(int64_t b, int64_t h) const {
    return static_cast<const T*>(data) + b * stride_b + h * stride_h;
  }
};

// A (batch, tokens) mask of the tokens to use; all tokens are used if data is null.
struct Mask {
  const uint8_t* data;
  int64_t stride_b, stride_n;

  __device__ bool keeps(int64_t b, int64_t n) const { return !data || data[b * stride_b + n * stride_n] != 0; }
};

// The tokens [begin, begin + rows) of (b, h); tokens from `end` on are out of bounds.
struct Rows {
  int64_t b, h, begin, end;
  int rows;

  __device__ bool kept(const Mask& mask, int row) const {
    bool inside = true;
    XK_STEP(tail_mask, inside = begin + row < end);
    return inside && mask.keeps(b, begin + row);
  }
};

// Distribution of rows of `features` numbers over threads, with `numbers` numbers per access. `count` adjacent threads
// process a row: the smallest power of two that covers the row with one access each, at most 32.
template <int kThreads>
struct Lanes {
  int row, rows, lane, count;  // this thread's first row, and the step to its next; its lane of `count` in a row

  __device__ Lanes(int features, int numbers) {
    int shift = 0;
    while (shift < 5 && numbers << shift < features) ++shift;
    count = 1 << shift;
    lane = (int)threadIdx.x & (count - 1);
    row = (int)threadIdx.x >> shift;
    rows = kThreads >> shift;
  }
};

// Loads tokens into rows of padded<T>(kColumns) numbers. Masked and out-of-bounds tokens are loaded as zeros. Columns
// beyond the features are not written: see clear_columns. Uses asynchronous copies if x.vector is not 0; the caller
// must commit and wait.
template <class T, int kColumns, int kThreads>
__device__ void load_tile(Shared<T> tile, const Operand& x, const Rows& r, const Mask& mask) {
  const T* base = x.head<T>(r.b, r.h);
  if (x.vector) {
    int numbers = x.vector / (int)sizeof(T);
    Lanes<kThreads> lanes(x.features, numbers);
    const T* from = base + (r.begin + lanes.row) * x.stride_n;
    int64_t step = lanes.rows * x.stride_n;
    for (int row = lanes.row; row < r.rows; row += lanes.rows, from += step) {
      bool keep = r.kept(mask, row);
      const T* token = keep ? from : base;
      for (int c = lanes.lane * numbers; c < x.features; c += lanes.count * numbers) {
        T* to = &tile[row * padded<T>(kColumns) + c];
        if (x.vector == 16)
          __pipeline_memcpy_async(to, token + c, 16, keep ? 0 : 16);
        else if (x.vector == 8)
          __pipeline_memcpy_async(to, token + c, 8, keep ? 0 : 8);
        else
          __pipeline_memcpy_async(to, token + c, 4, keep ? 0 : 4);
      }
    }
    return;
  }
  for (int row = (int)threadIdx.x / 32; row < r.rows; row += kThreads / 32) {
    bool keep = r.kept(mask, row);
    const T* from = base + (keep ? (r.begin + row) * x.stride_n : 0);
    for (int c = (int)threadIdx.x % 32; c < x.features; c += 32)
      tile[row * padded<T>(kColumns) + c] = keep ? from[c * x.stride_d] : narrow<T>(0);
  }
}

// Writes zeros from column `features` on, since products read these columns too.
template <class T, int kColumns, int kThreads>
__device__ void clear_columns(Shared<T> tile, int features, int rows) {
#pragma unroll 1
  for (int row = (int)threadIdx.x / 32; row < rows; row += kThreads / 32)
#pragma unroll 1
    for (int c = features + (int)threadIdx.x % 32; c < kColumns; c += 32)
      XK_STEP(column_mask, tile[row * padded<T>(kColumns) + c] = narrow<T>(0));
}

// Sums of squares of the columns, over all tiles passed to add(). A thread has the columns of one 32-bit word and
// every kGroups-th row. Each tile is summed separately before it is added to the total: two short
// sums are more accurate than one long sum.
template <class E, int kColumns, int kThreads>
class Squares {
  static constexpr int kTogether = sizeof(E) == 2 ? 2 : 1, kWords = kColumns / kTogether;
  static constexpr int kOwners = kWords < kThreads ? kWords : kThreads, kGroups = kThreads / kOwners;
  static_assert(kWords <= kThreads);

 public:
  static constexpr int kScratch = kGroups * kColumns;

  __device__ void add(Shared<E> tile, int rows) {
    if (group() >= kGroups) return;
    float now[kTogether] = {};
    for (int row = group(); row < rows; row += kGroups) {
      alignas(4) E numbers[kTogether];
      load_numbers<kTogether>(numbers, &tile[row * padded<E>(kColumns) + column()]);
      for (int i = 0; i < kTogether; ++i) {
        float x = widen(numbers[i]);
        now[i] += x * x;
      }
    }
    for (int i = 0; i < kTogether; ++i) sum_[i] += now[i];
  }

  // Writes out[c] for the first `count` columns; scratch: kScratch numbers. All threads must take part.
  template <class Out>
  __device__ void store(Out out, int count, Shared<float> scratch) {
    if (group() < kGroups)
      for (int i = 0; i < kTogether; ++i) scratch[group() * kColumns + column() + i] = sum_[i];
    __syncthreads();  // all groups have stored their sums
#pragma unroll 1
    for (int c = (int)threadIdx.x; c < count; c += kThreads) {
      float total = scratch[c];
#pragma unroll 1
      for (int g = 1; g < kGroups; ++g) total += scratch[g * kColumns + c];
      out[c] = total;
    }
    __syncthreads();  // scratch can be reused
  }

 private:
  float sum_[kTogether] = {};
  __device__ static int group() { return (int)threadIdx.x / kOwners; }
  __device__ static int column() { return (int)threadIdx.x % kOwners * kTogether; }
};

// An output tensor; features are contiguous. `vector`: as in Operand.
template <class T>
struct Result {
  T* data;
  int64_t stride_b, stride_h, stride_n;
  int32_t features, vector;

  __device__ T* token(int64_t b, int64_t h, int64_t n) const {
    return data + b * stride_b + h * stride_h + n * stride_n;
  }
};

template <int kCount>
using Count = std::integral_constant<int, kCount>;

// Writes all tokens that are in bounds, with zeros for masked tokens. values(Count<N>, row, column, to) computes N
// numbers of a row; column is a multiple of N. N numbers are 16 bytes if tokens are aligned to 16 bytes; otherwise N
// is 1.
template <class T, int kThreads, class Values>
__device__ void store_rows(const Result<T>& to, const Rows& r, const Mask& mask, Values values) {
  constexpr int kNumbers = kVector<T>;
  bool wide = to.vector == 16;
  Lanes<kThreads> lanes(to.features, wide ? kNumbers : 1);
  T* token = to.token(r.b, r.h, r.begin + lanes.row);
  int64_t step = lanes.rows * to.stride_n;
  for (int row = lanes.row; row < r.rows && r.begin + row < r.end; row += lanes.rows, token += step) {
    bool keep = mask.keeps(r.b, r.begin + row);  // masked tokens are 0 even if a map has NaN
    if (wide) {
      for (int c = lanes.lane * kNumbers; c < to.features; c += lanes.count * kNumbers) {
        alignas(16) float y[kNumbers];
        alignas(16) T numbers[kNumbers];
        values(Count<kNumbers>{}, row, c, y);
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) numbers[i] = narrow<T>(keep ? y[i] : 0.f);
        *reinterpret_cast<uint4*>(token + c) = *reinterpret_cast<const uint4*>(numbers);
      }
    } else {
      for (int c = lanes.lane; c < to.features; c += lanes.count) {
        float y[1];
        values(Count<1>{}, row, c, y);
        token[c] = narrow<T>(keep ? y[0] : 0.f);
      }
    }
  }
}

}  // namespace xk::cuda
