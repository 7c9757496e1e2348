// How a tile reads the elements of its operand a, and how many rows it has. Elements are broadcast one by one; on
// architectures whose multiply-add can use a single lane of a register as a scalar, they are read as whole vectors.
#pragma once

#include "halves.h"

namespace xk {
namespace XK_LEVEL {

#if defined(__aarch64__)
constexpr bool kByLane = true;
#else
constexpr bool kByLane = false;
#endif

// Maximum numbers of column vectors and of rows of a tile.
constexpr int kMaxNR = kByLane ? 4 : kRegisters >= 32 ? 5 : 3, kMaxMR = 16;

constexpr int least_of(int a, int b) { return a < b ? a : b; }
constexpr int most_of(int a, int b) { return a > b ? a : b; }

// Maximum number of rows of a tile with nr column vectors, the last of them shared by `sharing` rows: the accumulators,
// the vectors of b and the elements read of a must fit the registers. With kByLane one register is left free, and
// `sharing` is always 1.
constexpr int max_broadcast_rows(int nr, int sharing) {
  int rows = sharing == 1 ? (kRegisters - 1 - nr) / nr : (kRegisters - 3 - nr) * sharing / (sharing * (nr - 1) + 1);
  return least_of(rows / sharing * sharing, kMaxMR);
}
template <class T>
constexpr int max_gram_rows(int nr, int sharing) {
  if (!kByLane) return max_broadcast_rows(nr, sharing);
  int rows = kMaxMR;
  while (rows * nr + nr + (rows + VL<T> - 1) / VL<T> >= kRegisters) --rows;
  return rows;
}
constexpr int max_mix_rows(int nr, int sharing) {
  if (!kByLane) return max_broadcast_rows(nr, sharing);
  return least_of((kRegisters - 1 - nr) / (nr + 1), 9);  // each row also needs a pointer
}

template <class T, bool PAIRS>
XK_INLINE V<T> spread(const char* p) {
  typedef uint32_t pair __attribute__((aligned(2), may_alias));
  if constexpr (PAIRS)
    return (V<T>)(*(const pair*)p - VU32{});
  else
    return broadcast(*(const T*)p);
}

// The classes below walk over k, kSteps at a time: in each turn, read(step) and at(step, row) are called for every
// step, then next(). rest() reads the remaining steps, fewer than kSteps.

template <class T, bool PAIRS, int MR>
struct Broadcasts {
  static constexpr int kSteps = 1;
  // Every third row has a pointer; the next two rows use scaled indices, so that all addresses stay in registers.
  static constexpr int kPointers = (MR + 2) / 3;
  const char* p[kPointers];
  const ptrdiff_t row_bytes, k_bytes;
  XK_INLINE Broadcasts(const T* a, ptrdiff_t row_stride, ptrdiff_t k_stride)
      : row_bytes(row_stride * sizeof(T)), k_bytes(k_stride * sizeof(T)) {
#pragma GCC unroll 16
    for (int g = 0; g < kPointers; ++g) p[g] = (const char*)a + 3 * g * row_bytes;
  }
  XK_INLINE void read(int) {}
  XK_INLINE V<T> at(int, int r) const { return spread<T, PAIRS>(p[r / 3] + (r % 3) * row_bytes); }
  XK_INLINE void next() {
#pragma GCC unroll 16
    for (int g = 0; g < kPointers; ++g) p[g] += k_bytes;
  }
};

// For rows with unit stride. The last vector is read whole, up to VL - 1 elements past the last row: only for packed
// blocks, which are followed by scratch memory.
template <class T, int MR>
struct VectorsOfRows {
  static constexpr int kSteps = 2, kVectors = (MR + VL<T> - 1) / VL<T>;
  const T* p;
  const ptrdiff_t k_stride;
  V<T> x[kVectors];
  XK_INLINE VectorsOfRows(const T* a, ptrdiff_t k_stride) : p(a), k_stride(k_stride) {}
  XK_INLINE void read(int) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) x[i] = load(p + i * VL<T>);
    p += k_stride;
  }
  XK_INLINE V<T> at(int, int r) const { return broadcast(x[r / VL<T>][r % VL<T>]); }
  XK_INLINE void next() {}
  XK_INLINE Broadcasts<T, false, MR> rest() const { return {p, 1, k_stride}; }
};

// For k with unit stride.
template <class T, int MR>
struct VectorsOfSteps {
  static constexpr int kSteps = VL<T>;
  const T* p[MR];
  V<T> x[MR];
  XK_INLINE VectorsOfSteps(const T* a, ptrdiff_t row_stride) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) p[r] = a + r * row_stride;
  }
  XK_INLINE void read(int step) {
    if (step) return;
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) x[r] = load(p[r]);
  }
  XK_INLINE V<T> at(int step, int r) const { return broadcast(x[r][step]); }
  XK_INLINE void next() {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) p[r] += VL<T>;
  }
  XK_INLINE Broadcasts<T, false, MR> rest() const { return {p[0], MR > 1 ? p[1] - p[0] : 0, 1}; }
};

// Elements of a Gram tile, whose rows have unit stride, and of a mix tile, whose k has. Broadcasts support any strides,
// which products with features as rows need.
template <class T, bool PAIRS, int MR>
XK_INLINE auto gram_elements(const T* a, ptrdiff_t row_stride, ptrdiff_t k_stride) {
  if constexpr (kByLane)
    return VectorsOfRows<T, MR>(a, k_stride);
  else
    return Broadcasts<T, PAIRS, MR>(a, row_stride, k_stride);
}
template <class T, bool PAIRS, int MR>
XK_INLINE auto mix_elements(const T* x, ptrdiff_t row_stride, ptrdiff_t k_stride) {
  if constexpr (kByLane)
    return VectorsOfSteps<T, MR>(x, row_stride);
  else
    return Broadcasts<T, PAIRS, MR>(x, row_stride, k_stride);
}

}  // namespace XK_LEVEL
}  // namespace xk
