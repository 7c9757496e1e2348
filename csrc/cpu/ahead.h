// Software prefetch: which cache lines a product prefetches.
#pragma once

#include "vec.h"

namespace xk {
namespace XK_LEVEL {

// Steps of a product's inner loop between prefetches. With more or longer registers, tiles are larger, and a block has
// fewer steps.
constexpr int kPrefetchEvery = 8192 / (kRegisters * kVectorBytes);

// The cache lines of tokens that are needed soon, in memory order: `lines` of one token, then those of the next one.
// They are prefetched a few at a time, evenly over the products of a block, because memory and arithmetic take about
// equally long and the rows of a head are too short for the hardware prefetcher. They are prefetched into L2: in L1,
// rows a power of two apart would evict each other and the current block.
struct Ahead {
  const char* next = nullptr;
  ptrdiff_t row = 0;      // bytes from token to token
  ptrdiff_t lines = 0;    // cache lines per token
  ptrdiff_t left = 0;     // lines left of the current token
  ptrdiff_t tokens = 0;   // tokens left, including the current one
  ptrdiff_t at_once = 0;  // lines per call of prefetch(); 0: nothing is left

  Ahead() = default;
  // `bytes` of each of `count` tokens, starting at p, all of them after `calls` calls. Tokens without gaps are one run.
  Ahead(const char* p, ptrdiff_t row, ptrdiff_t bytes, ptrdiff_t count, ptrdiff_t calls)
      : next(p),
        row(row),
        lines((((ptrdiff_t)p & 63) + (row == bytes ? count : 1) * bytes + 63) / 64),
        left(lines),
        tokens(row == bytes ? 1 : count),
        at_once((lines * tokens + calls - 1) / calls) {}

  XK_INLINE void prefetch() {
    for (ptrdiff_t i = 0; i < at_once; ++i) {
      __builtin_prefetch(next, 0, 2);
      next += 64;
      if (--left) continue;
      left = lines;
      next += row - lines * 64;
      if (!--tokens) at_once = 0;
    }
  }
};

}  // namespace XK_LEVEL
}  // namespace xk
