// Which cache lines a product asks for ahead of their use.
#pragma once

#include "vec.h"

namespace xk {
namespace XK_LEVEL {

// Cache lines of tokens that are needed soon, in the order of memory: `lines` of a token, then those of the next one.
// One is asked for per step of a product's inner loop, because memory and arithmetic take about as long as each other
// and rows of a head are too short for the hardware to guess. They go to the second-level cache: rows a power of two
// apart would push each other, and the block at hand, out of the first.
struct Ahead {
  const char* next = nullptr;
  ptrdiff_t row = 0;     // bytes from token to token
  ptrdiff_t lines = 0;   // cache lines of a token
  ptrdiff_t left = 0;    // of the token at hand
  ptrdiff_t tokens = 0;  // with the one at hand; 0: nothing is asked for

  Ahead() = default;
  // `bytes` of each of `count` tokens, from p on
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
