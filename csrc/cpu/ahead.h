// Software prefetch: which cache lines a product prefetches.
#pragma once

#include "vec.h"

namespace xk {
namespace XK_LEVEL {

// The cache lines of tokens that are needed soon, in memory order: `lines` of one token, then those of the next one.
// One line is prefetched per step of a product's inner loop, because memory and arithmetic take about equally long and
// the rows of a head are too short for the hardware prefetcher. They are prefetched into L2: in L1, rows a power of two
// apart would evict each other and the current block.
struct Ahead {
  const char* next = nullptr;
  ptrdiff_t row = 0;     // bytes from token to token
  ptrdiff_t lines = 0;   // cache lines per token
  ptrdiff_t left = 0;    // lines left of the current token
  ptrdiff_t tokens = 0;  // tokens left, including the current one; 0: nothing is prefetched

  Ahead() = default;
  // `bytes` of each of `count` tokens, starting at p
  Ahead(const char* p, ptrdiff_t row, ptrdiff_t bytes, ptrdiff_t count)
      : next(p), row(row), lines((((ptrdiff_t)p & 63) + bytes + 63) / 64), left(lines), tokens(count) {}

  XK_INLINE ptrdiff_t at_most(ptrdiff_t steps, ptrdiff_t at_once) const {
    const ptrdiff_t mine = (left + at_once - 1) / at_once;
    return tokens && mine < steps ? mine : steps;
  }
  XK_INLINE void took(ptrdiff_t count) {
    if (!tokens) return;
    left -= count;
    next += count * 64;
    if (left > 0) return;
    next += row - (lines - left) * 64;
    left = lines;
    --tokens;
  }
};

}  // namespace XK_LEVEL
}  // namespace xk
