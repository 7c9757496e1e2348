// Register tiles. Both large products use the same loop,
//
//     acc[r][c] += a[r, k] * b[k, c]        r < MR rows, c < NR vectors of columns, k < K
//
// where the elements of a are broadcast (elements.h) and b is read as vectors. With PAIRS, the elements are pairs of
// bf16 and each product is the sum of two products; everything else is the same. A Gram tile has features as rows and
// tokens as k; a mix tile has tokens as rows and input features as k. The MR * NR accumulators, NR vectors of b and the
// elements read of a fit the registers. Rows and column vectors of a product are cut into tiles of almost equal size
// (`Cut`).
#pragma once

#include "ahead.h"
#include "elements.h"
#include "rows.h"

namespace xk {
namespace XK_LEVEL {

// Cuts `total` into the fewest parts of size at most `most`, with sizes that differ by at most one.
struct Cut {
  int parts, small, larger;
  Cut(int total, int most) : parts((total + most - 1) / most), small(parts ? total / parts : 0) {
    larger = total - parts * small;
  }
  int size(int part) const { return small + (part < larger); }
  int start(int part) const { return part * small + (part < larger ? part : larger); }
};

// If the last vector of columns is at most half full, G rows share one vector, with W = VL / G lanes each, so that G
// rows cost one multiply-add. `slot<R>` returns t with lanes 0..W-1 of x in the lanes of row R; `choose<R>` returns t
// with the lanes of row R taken from x; `unslot<R>` copies the lanes of row R to the lanes of every row.
template <class T, int G>
struct Shared {
  static constexpr int W = VL<T> / G;
  template <int R, int... L>
  XK_INLINE static V<T> slot(V<T> t, V<T> x, Lanes<L...>) {
    return XK_SHUFFLE(t, x, (L / W == R ? VL<T> + L % W : L)...);
  }
  template <int R, int... L>
  XK_INLINE static V<T> choose(V<T> t, V<T> x, Lanes<L...>) {
    return XK_SHUFFLE(t, x, (L / W == R ? VL<T> + L : L)...);
  }
  template <int R, int... L>
  XK_INLINE static V<T> unslot(V<T> t, Lanes<L...>) {
    return XK_SHUFFLE(t, t, (R * W + L % W)...);
  }
};

template <bool PAIRS, class A>
XK_INLINE A add_product(A sum, A a, A b) {
  if constexpr (PAIRS)
    return add_product_of_pairs(sum, a, b);
  else
    return sum + a * b;
}

// If G > 1, the last of the NR vectors is shared.
template <class T, bool PAIRS, int MR, int NR, int G, class Elements>
XK_INLINE void accumulate(V<T> (&acc)[MR][NR], Elements a, const T* b, ptrdiff_t ldb, ptrdiff_t K, Ahead& ahead0,
                          Ahead& ahead1) {
  constexpr typename FirstLanes<VL<T>>::type lanes{};
  constexpr int own = G > 1 ? NR - 1 : NR;  // vectors that are not shared
  V<T> shared[MR / G];
  if constexpr (G > 1) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; r += G) {
      shared[r / G] = acc[r][NR - 1];
      shared[r / G] = Shared<T, G>::template slot<1>(shared[r / G], acc[r + 1][NR - 1], lanes);
      if constexpr (G > 2) {
        shared[r / G] = Shared<T, G>::template slot<2>(shared[r / G], acc[r + 2][NR - 1], lanes);
        shared[r / G] = Shared<T, G>::template slot<3>(shared[r / G], acc[r + 3][NR - 1], lanes);
      }
    }
  }
  constexpr int kSteps = Elements::kSteps;
  constexpr ptrdiff_t kTurns = most_of(kPrefetchEvery / kSteps, 1);  // between prefetches
  const ptrdiff_t turns = K / kSteps;
  for (ptrdiff_t k = 0; k < turns;) {
    const ptrdiff_t stop = turns - k < kTurns ? turns : k + kTurns;
    ahead0.prefetch(), ahead1.prefetch();
    for (; k < stop; ++k) {
#pragma GCC unroll 4
      for (int step = 0; step < kSteps; ++step, b += ldb) {
        a.read(step);
        V<T> row[NR], mixed{};
#pragma GCC unroll 8
        for (int c = 0; c < NR; ++c) row[c] = load(b + c * VL<T>);
        if constexpr (G > 1) row[NR - 1] = Shared<T, G>::template unslot<0>(row[NR - 1], lanes);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
          V<T> x = a.at(step, r);
          if constexpr (G > 1) XK_OPAQUE(x);  // otherwise compilers turn `choose` into more instructions than it saves
#pragma GCC unroll 8
          for (int c = 0; c < own; ++c) acc[r][c] = add_product<PAIRS>(acc[r][c], x, row[c]);
          if constexpr (G > 1) {
            if (r % G == 0) mixed = x;
            if (r % G == 1) mixed = Shared<T, G>::template choose<1>(mixed, x, lanes);
            if (r % G == 2) mixed = Shared<T, G>::template choose<2>(mixed, x, lanes);
            if (r % G == 3) mixed = Shared<T, G>::template choose<3>(mixed, x, lanes);
            if (r % G == G - 1) shared[r / G] = add_product<PAIRS>(shared[r / G], mixed, row[NR - 1]);
          }
        }
      }
      a.next();
    }
  }
  if constexpr (kSteps > 1) accumulate<T, PAIRS, MR, NR, G>(acc, a.rest(), b, ldb, K % kSteps, ahead0, ahead1);
  if constexpr (G > 1) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; r += G) {
      acc[r][NR - 1] = shared[r / G];
      acc[r + 1][NR - 1] = Shared<T, G>::template unslot<1>(shared[r / G], lanes);
      if constexpr (G > 2) {
        acc[r + 2][NR - 1] = Shared<T, G>::template unslot<2>(shared[r / G], lanes);
        acc[r + 3][NR - 1] = Shared<T, G>::template unslot<3>(shared[r / G], lanes);
      }
    }
  }
}

// g[r, c] += sum over tokens of a[n, r] * b[n, c], for `tiles` tiles below each other. Each block of tokens is summed
// separately first, so that rounding errors grow with the number of blocks, not of tokens. b is a packed block (tokens
// x ldb); g is padded to whole vectors.
template <class T>
struct GramTile {
  const T *a, *b;
  ptrdiff_t a_row, a_k, ldb, tokens;  // a_row, a_k: strides of a over features and over tokens
  T* g;
  ptrdiff_t ldg;
  Ahead* ahead;  // two
  int tiles;
};

template <class T, bool PAIRS, int MR, int NR, int G>
void gram_tile(const GramTile<T>& t) {
  const T* a = t.a;
  T* g = t.g;
  for (int tile = 0; tile < t.tiles; ++tile, a += MR * t.a_row) {
    V<T> acc[MR][NR];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < NR; ++c) acc[r][c] = V<T>{};
    accumulate<T, PAIRS, MR, NR, G>(acc, gram_elements<T, PAIRS, MR>(a, t.a_row, t.a_k), t.b, t.ldb, t.tokens, *t.ahead,
                                    t.ahead[1]);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r, g += t.ldg)
#pragma GCC unroll 8
      for (int c = 0; c < NR; ++c) store(g + c * VL<T>, load(g + c * VL<T>) + acc[r][c]);
  }
}

// y[n, o] = bias[o] + scale[o] * add[n, o] + sum_k x[n, k] w[k, o] (+ sum_k x2[n, k] w2[k, o]) for `tiles` times MR
// tokens, or the hard-swish of this.
// `divided`: the sums of row n are multiplied by divided[n] before the other terms are added.
// x has unit stride along k (x_k). w, bias and scale are padded to whole vectors. add and y have unit stride along o,
// and their last vector has `last_lanes` columns.
// by_rows: the transposed product y[o, n], for features as rows. x and w swap roles, so x has unit stride along its
// rows; bias and scale are indexed by row, and `divided` by column.
template <class T>
struct MixTile {
  const T* x;
  ptrdiff_t x_row, x_k, K;
  const T* w;
  ptrdiff_t ldw;
  ptrdiff_t panel_rows, panel_row;  // of w by panels (below); panel_rows is 0 otherwise
  const T* x2;
  ptrdiff_t x2_row, K2;
  const T* w2;
  const T *bias, *scale;
  const void* add;
  ptrdiff_t ld_add;
  int add_dtype;
  void* y;
  ptrdiff_t ldy;
  int dtype, last_lanes;
  bool hard_swish, by_rows;
  const T* divided;
  const T* after;  // added after the activation, if given
  ptrdiff_t ld_after;
  Ahead* ahead;  // two
  int tiles;

  XK_INLINE void advance(int rows) {
    x += rows * x_row;
    y = (char*)y + rows * ldy * itemsize(dtype);
    if (x2) x2 += rows * x2_row;
    if (divided && !by_rows) divided += rows;
    if (scale && by_rows) scale += rows;
    if (bias && by_rows) bias += rows;
    if (add) add = (const char*)add + rows * ld_add * itemsize(add_dtype);
    if (after) after += rows * ld_after;
  }
};

template <class T, int MR, int NR, class S>
XK_INLINE void store_tile(V<T> (&acc)[MR][NR], S* y, ptrdiff_t ldy, int last_lanes) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < NR - 1; ++c) store(y + r * ldy + c * VL<T>, acc[r][c]);
    if (last_lanes == VL<T>)
      store(y + r * ldy + (NR - 1) * VL<T>, acc[r][NR - 1]);
    else
      store(y + r * ldy + (NR - 1) * VL<T>, acc[r][NR - 1], last_lanes);
  }
}

template <class T, bool PAIRS, int MR, int NR, int G>
XK_INLINE void mix_one(const MixTile<T>& t) {
  V<T> acc[MR][NR];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < NR; ++c) acc[r][c] = V<T>{};
  accumulate<T, PAIRS, MR, NR, G>(acc, mix_elements<T, PAIRS, MR>(t.x, t.x_row, t.x_k), t.w, t.ldw, t.K, *t.ahead,
                                  t.ahead[1]);
  if (t.x2)
    accumulate<T, PAIRS, MR, NR, G>(acc, mix_elements<T, PAIRS, MR>(t.x2, t.x2_row, 1), t.w2, t.ldw, t.K2, *t.ahead,
                                    t.ahead[1]);
  if (t.divided) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < NR; ++c) acc[r][c] *= t.by_rows ? load(t.divided + c * VL<T>) : broadcast(t.divided[r]);
  }
  // After the products: added to larger numbers, they would be rounded to the precision of those.
  if (t.add)
    with_storage<T>(t.add_dtype, [&](auto* storage) {
#pragma GCC unroll 8
      for (int c = 0; c < NR; ++c) {
        const V<T> scale = t.scale && !t.by_rows ? load(t.scale + c * VL<T>) : broadcast(T(1));
        auto scale_of = [&](int r) { return t.scale && t.by_rows ? broadcast(t.scale[r]) : scale; };
        auto add = (decltype(storage))t.add + c * VL<T>;
        if (c < NR - 1 || t.last_lanes == VL<T>) {
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r) acc[r][c] += scale_of(r) * load(add + r * t.ld_add);
        } else {
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r) acc[r][c] += scale_of(r) * load(add + r * t.ld_add, t.last_lanes);
        }
      }
    });
  if (t.bias) {
#pragma GCC unroll 8
    for (int c = 0; c < NR; ++c) {
      const V<T> bias = t.by_rows ? V<T>{} : load(t.bias + c * VL<T>);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) acc[r][c] += t.by_rows ? broadcast(t.bias[r]) : bias;
    }
  }
  if (t.hard_swish) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < NR; ++c) acc[r][c] = hard_swish<T>(acc[r][c]);
  }
  if (t.after) {
#pragma GCC unroll 8
    for (int c = 0; c < NR; ++c) {
      const T* after = t.after + c * VL<T>;
      const bool whole = c < NR - 1 || t.last_lanes == VL<T>;
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r, after += t.ld_after) acc[r][c] += whole ? load(after) : load(after, t.last_lanes);
    }
  }
  with_storage<T>(t.dtype,
                  [&](auto* storage) { store_tile<T, MR, NR>(acc, (decltype(storage))t.y, t.ldy, t.last_lanes); });
}

template <class T, bool PAIRS, int MR, int NR, int G>
void mix_tile(MixTile<T>& t) {
  for (int left = t.tiles; left > 0; --left, t.advance(MR)) mix_one<T, PAIRS, MR, NR, G>(t);
}

// Tiles by log2 of the sharing (how many rows share the last vector), number of vectors and number of rows. Entries
// that do not fit the registers, or whose rows are not a multiple of the sharing, are null and never used.
template <class T, bool PAIRS>
struct Tiles {
  static constexpr int kSharing = VL<T> >= 16 ? 3 : VL<T> >= 8 ? 2 : 1;  // G = 1, 2, 4: W is never below 4
  void (*gram[3][kMaxNR][kMaxMR])(const GramTile<T>&) = {};
  void (*mix[3][kMaxNR][kMaxMR])(MixTile<T>&) = {};

  template <int S, int NR, int MR>
  constexpr void fill_rows() {
    constexpr int G = 1 << S;
    if constexpr (MR <= max_gram_rows<T>(NR, G)) gram[S][NR - 1][MR - 1] = gram_tile<T, PAIRS, MR, NR, G>;
    if constexpr (MR <= max_mix_rows(NR, G)) mix[S][NR - 1][MR - 1] = mix_tile<T, PAIRS, MR, NR, G>;
    if constexpr (MR + G <= kMaxMR) fill_rows<S, NR, MR + G>();
  }
  template <int S, int NR = 1>
  constexpr void fill() {
    fill_rows<S, NR, (1 << S)>();
    if constexpr (NR < kMaxNR) fill<S, NR + 1>();
  }
  constexpr Tiles() {
    fill<0>();
    if constexpr (kSharing > 1) fill<1>();
    if constexpr (kSharing > 2) fill<2>();
  }
};

template <class T, bool PAIRS = false>
constexpr Tiles<T, PAIRS> kTiles{};

// log2 of the number of rows that may share the last vector of `cols` columns.
template <class T>
int sharing(int cols) {
  int last = (cols - 1) % VL<T> + 1;
  for (int s = Tiles<T, false>::kSharing - 1; s > 0; --s)
    if (last <= VL<T> >> s) return s;
  return 0;
}

// The number of prefetches of a product of K steps, whose tiles have at most most_rows(vectors of a panel) rows.
template <class T, class F>
int prefetches(int K, int rows, int cols, F most_rows) {
  const Cut panels((cols + VL<T> - 1) / VL<T>, kMaxNR);
  const Cut tiles(rows, most_rows(panels.size(0)));
  return panels.parts * tiles.parts * ((K + kPrefetchEvery - 1) / kPrefetchEvery);
}

// Cuts the rows of one panel into tiles of at most `most` rows and calls f(first row, rows of a tile, log2 of the
// sharing, tiles) for all tiles of one size. Rows beyond a multiple of the sharing form one last tile without sharing.
template <class F>
void for_tiles(int rows, int most, int sharing, F f) {
  const Cut tiles(rows >> sharing, most >> sharing);
  const int small = tiles.small << sharing, large = small + (1 << sharing);
  if (tiles.larger) f(0, large, sharing, tiles.larger);
  if (tiles.parts > tiles.larger) f(tiles.larger * large, small, sharing, tiles.parts - tiles.larger);
  const int row = rows >> sharing << sharing;
  if (row < rows) f(row, rows - row, 0, 1);
}

// Products over one packed block of tokens, tile by tile. The outer loop is over columns, so that a panel of b stays in
// cache for all rows. The panels of a block that is larger than kCopied are copied before their products: with rows of
// all columns, rows that are a power of two apart would evict each other.
constexpr int kMostTokens = 96, kCopied = 16 << 10;

template <class T, bool PAIRS = false>
void gram_block(const GramTile<T>& whole, int rows, int cols, bool lower_only) {
  Cut panels((cols + VL<T> - 1) / VL<T>, kMaxNR);
  GramTile<T> t = whole;
  alignas(64) T copy[kMostTokens * kMaxNR * VL<T>];
  const bool copied = panels.parts > 1 && whole.tokens * whole.ldb * ptrdiff_t(sizeof(T)) > kCopied;
  for (int p = 0, vec = 0; p < panels.parts; vec += panels.size(p++)) {
    int nr = panels.size(p), first_col = vec * VL<T>, shared = p + 1 == panels.parts ? sharing<T>(cols) : 0;
    t.b = whole.b + first_col;
    if (copied) {
      t.ldb = nr * VL<T>;
      for (ptrdiff_t n = 0; n < whole.tokens; ++n)
        for (int c = 0; c < t.ldb; c += VL<T>) store(copy + n * t.ldb + c, load(t.b + n * whole.ldb + c));
      t.b = copy;
    }
    for_tiles(rows, max_gram_rows<T>(nr, 1 << shared), shared, [&](int row, int size, int s, int tiles) {
      const int above = lower_only && first_col > row ? least_of((first_col - row) / size, tiles) : 0;
      if (above == tiles) return;
      t.a = whole.a + (row + above * size) * t.a_row;
      t.g = whole.g + (row + above * size) * t.ldg + first_col;
      t.tiles = tiles - above;
      kTiles<T, PAIRS>.gram[s][nr - 1][size - 1](t);
    });
  }
}

// Writes panel i of the transpose of a weight (out, in) to its place in w by panels.
template <class T, class S>
void pack_panel(const S* weight, int64_t stride_out, int64_t stride_in, int in, int out, const Cut& panels, int i,
                T* w) {
  const int column = panels.start(i) * VL<T>, wide = panels.size(i) * VL<T>, columns = least_of(wide, out - column);
  weight += column * stride_out;
  w += (size_t)column * in;
  if constexpr ((sizeof(S) == sizeof(double)) == (sizeof(T) == sizeof(double)))  // vectors of S convert to those of T
    if (stride_in == 1) return pack_transposed(weight, stride_out, in, columns, w, wide);
  pack_strided(weight, stride_in, stride_out, in, columns, w, wide);
}

// w by panels: the columns of each panel are contiguous, panel_rows rows of them, panel after panel; the product starts
// at row panel_row. With rows of all columns, rows that are a power of two apart would evict each other.
// first_panel, last_panel: the panels to compute; by default all.
template <class T, bool PAIRS = false>
void mix_block(const MixTile<T>& whole, int tokens, int cols, int first_panel = 0, int last_panel = 1 << 30) {
  Cut panels((cols + VL<T> - 1) / VL<T>, kMaxNR);
  for (int p = first_panel; p < panels.parts && p < last_panel; ++p) {
    int nr = panels.size(p), first_col = panels.start(p) * VL<T>, rest = cols - first_col - (nr - 1) * VL<T>;
    MixTile<T> panel = whole;
    if (panel.panel_rows) {
      panel.ldw = nr * VL<T>;
      panel.w += first_col * panel.panel_rows + panel.panel_row * panel.ldw;
      if (panel.w2) panel.w2 += first_col * panel.K2;
    } else {
      panel.w += first_col;
      if (panel.w2) panel.w2 += first_col;
    }
    if (panel.bias && !panel.by_rows) panel.bias += first_col;
    if (panel.scale && !panel.by_rows) panel.scale += first_col;
    if (panel.divided && panel.by_rows) panel.divided += first_col;
    if (panel.add) panel.add = (const char*)panel.add + first_col * itemsize(panel.add_dtype);
    if (panel.after) panel.after += first_col;
    panel.y = (char*)panel.y + first_col * itemsize(panel.dtype);
    panel.last_lanes = rest < VL<T> ? rest : VL<T>;
    const int shared = p + 1 == panels.parts ? sharing<T>(cols) : 0;
    for_tiles(tokens, max_mix_rows(nr, 1 << shared), shared, [&](int row, int size, int s, int tiles) {
      MixTile<T> t = panel;
      t.advance(row);
      t.tiles = tiles;
      kTiles<T, PAIRS>.mix[s][nr - 1][size - 1](t);
    });
  }
}

}  // namespace XK_LEVEL
}  // namespace xk
