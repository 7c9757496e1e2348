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

  // Line `line` of the first token, or an address that costs nothing.
  XK_INLINE const char* at(ptrdiff_t line, const void* idle) const {
    return line < lines ? base + line * 64 : (const char*)idle;
  }
  XK_INLINE ptrdiff_t step(ptrdiff_t line) const { return line < lines ? row : 0; }
};

}  // namespace XK_LEVEL
}  // namespace xk
