// Which cache lines a product asks for ahead of their use.
#pragma once

#include "vec.h"

namespace xk {
namespace XK_LEVEL {

// Cache lines of the next block of tokens, asked for one per step of k while this block is multiplied: memory and
// arithmetic take about as long as each other, and rows of a head are too short and too far apart for the hardware to
// guess. One line of `rows` tokens after another; when all `lines` of a token have been asked for, nothing more. They
// go to the second-level cache: rows a power of two apart would push each other, and the block at hand, out of the
// first.
struct Ahead {
  const char* base = nullptr;  // first token
  ptrdiff_t row = 0;           // bytes from token to token
  ptrdiff_t lines = 0;         // cache lines of a token; 0: off
  // Where tokens lie side by side: features take the place of tokens. How many there are, and the first line of a tile.
  ptrdiff_t features = 0, line = 0;

  // After a tile of K steps.
  void advance(ptrdiff_t K) {
    if (features) line += (K + features - 1) / features;
  }
};

// The lines of one operand in the order in which a tile asks for them, from line `line` on.
template <int AT_ONCE>
struct Lines {
  const Ahead& ahead;
  const char *idle, *next;  // idle: an address that costs nothing, when all have been asked for
  ptrdiff_t line, steps, left = 0, step = 0;
  XK_INLINE Lines(const Ahead& a, const void* idle, ptrdiff_t rows, ptrdiff_t line)
      : ahead(a),
        idle((const char*)idle),
        next(this->idle),
        line(a.features ? a.line : line),
        steps(((a.features ? a.features : rows) + AT_ONCE - 1) / AT_ONCE) {}
  XK_INLINE void begin_line() {
    if (left) return;
    const bool more = line < ahead.lines;
    next = more ? ahead.base + line * 64 : idle;
    step = more ? ahead.row : 0;
    left = steps;
    ++line;
  }
};

}  // namespace XK_LEVEL
}  // namespace xk
