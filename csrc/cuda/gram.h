// The first pass: Gram matrices and sums of squares over a chunk of the tokens.
#pragma once

#include "product.h"
#include "tokens.h"

namespace xk::cuda {

// Results for (parts, batch, heads), each array with its step in numbers: G (features of a x features of b), sums of
// squares of a and of b.
template <class S>
struct GramArgs {
  Operand x[3];  // a, b and optionally c; if c has data, its sums of squares replace those of b
  Mask mask;
  int64_t batch, heads, tokens, parts, chunk;
  S *g, *ssq_a, *ssq_b;
  int64_t g_step, ssq_a_step, ssq_b_step;
  int32_t symmetric;       // a is b: tiles above the diagonal are copied from below it
  int32_t squares;         // whether sums of squares are computed
  int32_t norm_a, norm_b;  // whether tokens are divided by their feature norms
  double eps;
};

constexpr int kGramThreads = 128;

template <class Math, int kTile>
struct GramLayout {
  using E = Element<Math>;
  using S = Sum<E>;
  static constexpr int kRows = 128 / (int)sizeof(E), kStages = 2;
  static constexpr int kTileSize = kRows * padded<E>(kTile);
  Shared<E> x;      // (kStages, operands) tiles of (kRows, kTile)
  Shared<S> sums;   // (kTile, kTile), or scratch
  Shared<S> norms;  // of the tokens of a, then of b

  __host__ __device__ GramLayout(Arena& arena, int operands) {
    x = arena.take<E>(kStages * operands * kTileSize);
    sums = arena.take<S>(kTile * padded<S>(kTile));
    norms = arena.take<S>(2 * kRows);
  }
};

// A block computes a (kTile, kTile) tile of G for one chunk of the tokens of one (batch, head). Two-stage pipeline: the
// next kRows tokens are loaded while the current ones are multiplied.
template <class T, class Math, int kTile>
__global__ void __launch_bounds__(kGramThreads, sizeof(T) == 8 ? 2 : 3)
    gram_kernel(const __grid_constant__ GramArgs<Sum<T>> p) {
  using E = Element<Math>;
  using S = Sum<T>;
  using Layout = GramLayout<Math, kTile>;
  constexpr int kThreads = kGramThreads, kRows = Layout::kRows;
  int across = (int)cdiv(p.x[1].features, kTile), down = (int)cdiv(p.x[0].features, kTile);
  int64_t block = blockIdx.x;
  int64_t h = block % p.heads;
  block /= p.heads;
  int tile = (int)(block % (across * down));
  block /= across * down;
  int64_t part = block % p.parts, b = block / p.parts;
  int row0 = tile / across * kTile, column0 = tile % across * kTile;
  if (p.symmetric && column0 > row0) return;
  bool one_operand = p.symmetric && column0 == row0;

  XK_ARENA(arena);
  int operands = p.x[2].data ? 3 : 2;
  Layout s(arena, operands);
  bool squares = p.squares && !p.symmetric;  // of a symmetric G, the diagonal has the sums of squares
  bool squares_a = squares && column0 == 0, squares_c = squares_a && p.x[2].data;
  bool squares_b = squares && !p.x[2].data && row0 == 0;
  auto wanted = [&](int i) { return i == 0 || (i == 1 ? !one_operand : squares_c); };
  auto first = [&](int i) { return i == 1 ? column0 : row0; };
  Rows all{b, h, part * p.chunk, part * p.chunk + p.chunk < p.tokens ? part * p.chunk + p.chunk : p.tokens, kRows};
  auto tile_of = [&](int stage, int i) { return s.x + (stage * operands + i) * Layout::kTileSize; };
  auto features = [](const Operand& x, int first) { return x.features - first < kTile ? x.features - first : kTile; };

#pragma unroll 1
  for (int i = 0; i < 3; ++i)
#pragma unroll 1
    for (int stage = 0; stage < Layout::kStages; ++stage)
      if (wanted(i)) clear_columns<E, kTile, kThreads>(tile_of(stage, i), features(p.x[i], first(i)), kRows);

  Product<Math, kTile, kTile, kThreads, true> sums;
  Squares<E, kTile, kThreads> of_a, of_b, of_c;
  int stage = 1;
  for (int64_t begin = all.begin - kRows; begin < all.end; begin += kRows, stage ^= 1) {
    Rows next = all;
    next.begin = begin + kRows;
#pragma unroll 1
    for (int i = 0; i < 3 && next.begin < all.end; ++i)
      if (wanted(i)) load_tile<T, E, kTile, kThreads>(tile_of(stage ^ 1, i), p.x[i], first(i), next, p.mask);
    __pipeline_commit();
    if (begin < all.begin) continue;
    Shared<E> tile_a = tile_of(stage, 0), tile_b = tile_of(stage, one_operand ? 0 : 1);
    if constexpr (sizeof(E) >= 4) {
      Rows now = all;
      now.begin = begin;
      if (p.norm_a) row_norms<T, kThreads>(s.norms, p.x[0], now, p.mask);
      if (p.norm_b) row_norms<T, kThreads>(s.norms + kRows, p.x[1], now, p.mask);
    }
    __pipeline_wait_prior(1);
    XK_STEP(barrier, __syncthreads());  // the tokens of this stage, loaded by all threads, are in shared memory
    if constexpr (sizeof(E) >= 4) {
      if (p.norm_a || p.norm_b) {
#pragma unroll 4
        for (int at = (int)threadIdx.x; at < kRows * kTile; at += kThreads) {
          int row = at / kTile, place = row * padded<E>(kTile) + at % kTile;
          if (p.norm_a) tile_a[place] /= clamp_norm(s.norms[row], (S)p.eps);
          if (p.norm_b) tile_b[place] /= clamp_norm(s.norms[kRows + row], (S)p.eps);
        }
        __syncthreads();  // all tokens of this stage are normalised
      }
    }
    sums.multiply(tile_a, padded<E>(kTile), tile_b, padded<E>(kTile), kRows);
    if (squares_a) of_a.add(tile_a, kRows);
    if (squares_b) of_b.add(tile_b, kRows);
    if (squares_c) of_c.add(tile_of(stage, 2), kRows);
    __syncthreads();  // all threads have read this stage: the next step overwrites it
  }
  __pipeline_wait_prior(0);

  int64_t record = (part * p.batch + b) * p.heads + h;
  int rows = features(p.x[0], row0), columns = features(p.x[1], column0);
  if (squares_a) of_a.store(p.ssq_a + record * p.ssq_a_step + row0, rows, s.sums);
  if (squares_b) of_b.store(p.ssq_b + record * p.ssq_b_step + column0, columns, s.sums);
  if (squares_c) of_c.store(p.ssq_b + record * p.ssq_b_step + row0, rows, s.sums);
  sums.store(s.sums, padded<S>(kTile));
  __syncthreads();  // all threads have stored their sums
  S* g = p.g + record * p.g_step;
#pragma unroll 1
  for (int x = (int)threadIdx.x; x < rows * columns; x += kThreads) {
    int row = x / columns, column = x % columns;
    S value = s.sums[row * padded<S>(kTile) + column];
    g[(int64_t)(row0 + row) * p.x[1].features + column0 + column] = value;
    if (p.symmetric && !one_operand) g[(int64_t)(column0 + column) * p.x[1].features + row0 + row] = value;
    if (one_operand && row == column) {
      p.ssq_a[record * p.ssq_a_step + row0 + row] = value;
      p.ssq_b[record * p.ssq_b_step + row0 + row] = value;
    }
  }
}

// to[x][i] = sum over parts of from[x][part * count[x] + i], in a fixed order; x: G and the two sums of squares.
template <class S>
struct SumArgs {
  const S* from[3];
  S* to[3];
  int64_t count[3], parts;
};

constexpr int kSumThreads = 256;

template <class S>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ SumArgs<S> p) {
#pragma unroll 1
  for (int x = 0; x < 3; ++x)
    for (int64_t i = (int64_t)blockIdx.x * kSumThreads + threadIdx.x; i < p.count[x];
         i += (int64_t)gridDim.x * kSumThreads) {
      S total = p.from[x][i];
      for (int64_t part = 1; part < p.parts; ++part) total += p.from[x][part * p.count[x] + i];
      p.to[x][i] = total;
    }
}

}  // namespace xk::cuda
