// How a call is split into launches and blocks. Depends only on the sizes and the device.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "launch.h"
#include "tokens.h"
#include "weights.h"

namespace xk::cuda {

constexpr int kChunk = 256;  // tokens; chunks are multiples of it, since fewer tokens are not worth a block

struct Split {
  int64_t parts, chunk;
};

// Splits the tokens of each (batch, head) into the number of parts that fills its waves best. A wave is the `slots`
// blocks that the device can run at once. The number of parts is limited, since every block of the next launch reads
// the partial results of all parts (`record` bytes each): parts^2 * record is at most twice the bytes of the tokens
// (`row` bytes each).
inline Split split_evenly(int64_t tokens, int64_t heads, int64_t record, int64_t row, int64_t slots) {
  int64_t best = 1, most = cdiv(tokens, kChunk);
  auto filled = [&](int64_t parts) {
    int64_t blocks = parts * heads;
    return (double)blocks / (double)(cdiv(blocks, slots) * slots);
  };
  for (int64_t parts = 2; parts <= most && heads > 0 && (parts - 1) * heads < 2 * slots; ++parts) {
    if (parts * parts * record > 2 * tokens * row) break;
    if (filled(parts) > filled(best) + 0.02) best = parts;
  }
  int64_t chunk = cdiv(cdiv(tokens, best), kChunk) * kChunk;
  if (chunk == 0) return {1, kChunk};
  return {cdiv(tokens, chunk), chunk};
}

// The largest of 16, 8 and 4 that divides the address, `bytes` (the length of a row) and the strides, in bytes, of all
// dimensions with more than one element; 0 if there is none.
inline int vector_bytes(const xk_tensor& t, const int64_t (&sizes)[3], int64_t bytes, int64_t item) {
  const int64_t strides[3] = {t.stride_b, t.stride_h, t.stride_n};
  for (int vector = 16; vector >= 4; vector /= 2) {
    bool fits = reinterpret_cast<uintptr_t>(t.data) % (uintptr_t)vector == 0 && bytes % vector == 0;
    for (int i = 0; i < 3; ++i) fits = fits && (sizes[i] <= 1 || strides[i] * item % vector == 0);
    if (fits && vector >= item) return vector;
  }
  return 0;
}

struct Sizes {
  int64_t batch, heads, tokens;
};

inline Operand operand(const xk_tensor& t, const Sizes& n, int64_t features, int64_t item) {
  int vector = 0;
  if (t.stride_d == 1 || features == 1) vector = vector_bytes(t, {n.batch, n.heads, n.tokens}, features * item, item);
  return {t.data, t.stride_b, t.stride_h, t.stride_n, t.stride_d, (int32_t)features, vector};
}

template <class T>
Result<T> result(const xk_tensor& t, const Sizes& n, int64_t features) {
  if (features > 1 && t.stride_d != 1) throw Failure{XK_BAD_ARGUMENT, "features of a result must lie together"};
  int vector = vector_bytes(t, {n.batch, n.heads, n.tokens}, features * (int64_t)sizeof(T), sizeof(T));
  return {static_cast<T*>(t.data), t.stride_b, t.stride_h, t.stride_n, (int32_t)features, vector};
}

// Whether two passes can read or write these tokens: see XK_UNALIGNED. The kernels compute token strides in bytes in 32
// bits.
inline bool is_aligned(const xk_tensor& t, const Sizes& n, int64_t features, int64_t item, bool padded) {
  return (features == 1 || t.stride_d == 1) && std::abs(t.stride_n) <= INT32_MAX / item &&
         vector_bytes(t, {n.batch, n.heads, n.tokens}, padded ? 16 : features * item, item) == 16;
}

// Bump allocator over a workspace. With a null base, it only computes the required size.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <class S>
  S* take(int64_t count) {
    S* p = reinterpret_cast<S*>(base_ + used_);
    used_ += cdiv(count * (int64_t)sizeof(S), 256) * 256;
    return p;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

}  // namespace xk::cuda
