// The whole forward, or the whole backward, in one launch: the tokens of a (batch, head) stay in the shared memory of
// one block, or of the blocks of a cluster, between the two passes. Every token is read from global memory once.
//
// Each block of a cluster holds a part of the tokens and owns some columns of the map. A block stores the partial sums
// over its tokens in its shared memory. The owner of a column adds the partial sums of all blocks in rank order,
// computes the column and writes it to the shared memory of all blocks. Supports token norm and no norm; feature norm
// divides each token separately, so it cannot be applied to the sums over tokens.
#pragma once

#include "maps.h"
#include "product.h"
#include "tokens.h"
#include "weights.h"

namespace xk::cuda {

template <class T>
struct FusedArgs {
  Operand x[4];  // q, k, v, dout
  Mask mask;
  MapOptions options;
  PerHead temperature;
  int64_t heads, tokens;
  int32_t dim, rows;  // rows: tokens per block, a multiple of 16
  float* stats;
  Result<T> to[3];      // out; dq, dk, dv
  float* dtemperature;  // (batch, heads)
};

constexpr int kFusedThreads = 256, kMostBlocks = 16;

// Shared memory of both kernels. `tiles`: number of operands; `maps`: number of maps that blocks exchange.
template <class T, int kColumns>
struct FusedLayout {
  static constexpr int kThreads = kFusedThreads;
  // Tokens per product, limited by the registers for its accumulators.
  static constexpr int kRows = 8192 / kColumns / 16 * 16;
  static constexpr int kSums = kColumns > kRows ? kColumns : kRows;
  static constexpr int ld = padded<T>(kColumns), ld_sums = padded<float>(kColumns);
  Shared<T> x;    // (tiles, rows, kColumns)
  Shared<T> map;  // (kColumns, kColumns): the map that tokens are multiplied by
  Shared<float>
      sums;  // (kColumns, kColumns) of the first pass, read by all blocks; then (kRows, kColumns) of the second
  Shared<float> wide;     // (maps, kColumns, kColumns), written by all blocks
  Shared<float> strip;    // (kColumns, width): see `strip` in maps.h
  Shared<float> squares;  // of k and of q, kColumns each, read by all blocks
  Shared<float> norm_k, norm_q;
  Shared<float> scratch;  // for reductions over threads
  Shared<float> up, down;
  Shared<float> totals, totals_of;  // backward: sums along rows, of this block and of all blocks
  Shared<float> scale_q, scale_k;
  Shared<float> dt;  // partial sums of dtemperature, of all blocks
  int rows;

  __host__ __device__ FusedLayout(Arena& arena, int rows_, int tiles, int maps) : rows(rows_) {
    x = arena.take<T>(tiles * rows * ld);
    map = arena.take<T>(kColumns * ld);
    sums = arena.take<float>(kSums * ld_sums);
    wide = arena.take<float>(maps * kColumns * kColumns);
    strip = arena.take<float>(kColumns * 32);
    squares = arena.take<float>(2 * kColumns);
    norm_k = arena.take<float>(kColumns);
    norm_q = arena.take<float>(kColumns);
    scratch = arena.take<float>(2 * kThreads);
    up = arena.take<float>(kColumns);
    down = arena.take<float>(kColumns);
    if (maps > 1) {
      totals = arena.take<float>(kColumns);
      totals_of = arena.take<float>(kMostBlocks * kColumns);
      scale_q = arena.take<float>(kColumns);
      scale_k = arena.take<float>(kColumns);
      dt = arena.take<float>(kMostBlocks);
    }
  }

  __device__ Shared<T> tile(int i) const { return x + i * rows * ld; }

  // Number of columns that a block owns.
  __device__ static int columns_each(int dim) { return (dim + cluster_size() - 1) / cluster_size(); }

  // Sum of part[at] over all blocks of the cluster, in rank order.
  __device__ static float sum_of_blocks(Shared<float> part, int at) {
    float total = peer(part, 0)[at];
    for (int r = 1; r < cluster_size(); ++r) total += peer(part, r)[at];
    return total;
  }

  __device__ static void give_to_all(Shared<float> to, int at, float value) {
    for (int r = 0; r < cluster_size(); ++r) peer(to, r)[at] = value;
  }

  // Converts map `which` of `wide` to T and stores it in `map`. All threads must take part.
  __device__ void narrow_map(int which, int dim, bool transposed) {
    Shared<float> from = wide + which * kColumns * kColumns;
    auto get = [&](int in, int out) { return transposed ? from[out * kColumns + in] : from[in * kColumns + out]; };
    if constexpr (kScaled<T>) {
      scale_columns<kColumns, kThreads>(up, down, [&](int c) {
        float largest = 0;
        for (int i = 0; i < dim && c < dim; ++i) largest = fmaxf(largest, fabsf(get(i, c)));
        return largest;
      });
      __syncthreads();  // all scales are written
    }
    load_map<T, kColumns, kThreads>(map, dim, !transposed, up, get);
    __syncthreads();  // all threads have stored their part of the map
  }

  // to[n] = x[n] map + scale * add[n]; the second term only if has_add. All threads must take part.
  __device__ void mix(const Result<T>& to, const Rows& all, const Mask& mask, Shared<T> x_, Shared<T> add,
                      Shared<float> scale, bool has_add) {
    for (int first = 0; first < rows; first += kRows) {
      Rows r = all;
      r.begin += first;
      r.rows = rows - first < kRows ? rows - first : kRows;
      Product<T, kRows, kColumns, kThreads, false> y;
      y.multiply(x_ + first * ld, ld, map, ld, kColumns, r.rows);
      y.store(sums, ld_sums);
      __syncthreads();  // all threads have stored their products
      store_rows<T, kThreads>(to, r, mask, [&](auto count, int row, int c, float* value) {
        constexpr int kCount = decltype(count)::value;
        load_numbers<kCount>(value, &sums[row * ld_sums + c]);
        if constexpr (kScaled<T>) {
          alignas(16) float by[kCount];
          load_numbers<kCount>(by, &down[c]);
          for (int i = 0; i < kCount; ++i) value[i] *= by[i];
        }
        if (has_add) {
          alignas(16) float by[kCount];
          alignas(16) T also[kCount];
          load_numbers<kCount>(by, &scale[c]);
          load_numbers<kCount>(also, &add[(first + row) * ld + c]);
          for (int i = 0; i < kCount; ++i) value[i] += by[i] * widen(also[i]);
        }
      });
      __syncthreads();  // all threads have read the products
    }
  }
};

template <class T>
struct FusedHead {  // the (batch, head) and the tokens of this block
  int64_t b, h, record;
  Rows all;

  __device__ explicit FusedHead(const FusedArgs<T>& p) {
    int64_t head = blockIdx.x / cluster_size();
    h = head % p.heads;
    b = head / p.heads;
    record = head * (p.dim * p.dim + 2 * p.dim);
    all = Rows{b, h, (int64_t)cluster_rank() * p.rows, p.tokens, p.rows};
  }
};

template <class T, int kColumns>
__global__ void __launch_bounds__(kFusedThreads, 1) fused_forward_kernel(const __grid_constant__ FusedArgs<T> p) {
  using Layout = FusedLayout<T, kColumns>;
  constexpr int kThreads = kFusedThreads, ld = Layout::ld;
  FusedHead<T> head(p);
  XK_ARENA(arena);
  Layout s(arena, p.rows, 3, 1);
  Shared<T> q = s.tile(0), k = s.tile(1), v = s.tile(2);
  bool key_value = p.options.key_value != 0;

#pragma unroll 1
  for (int i = 0; i < 3; ++i) {
    int x = i == 0 ? 1 : (i == 1) == key_value ? 2 : 0;  // second-pass-only operands are loaded last
    load_tile<T, kColumns, kThreads>(s.tile(x), p.x[x], head.all, p.mask);
    if (i > 0) __pipeline_commit();
  }
#pragma unroll 1
  for (int i = 0; i < 3; ++i) clear_columns<T, kColumns, kThreads>(s.tile(i), p.dim, p.rows);
  __pipeline_wait_prior(1);
  XK_STEP(barrier, __syncthreads());  // operands of the first pass are in shared memory
  {
    Product<T, kColumns, kColumns, kThreads, true> sums;
    sums.multiply(k, ld, key_value ? v : q, ld, p.rows);
    sums.store(s.sums, Layout::ld_sums);
    Squares<T, kColumns, kThreads> of_k, of_q;
    of_k.add(k, p.rows);
    of_k.store(s.squares, kColumns, s.scratch);
    __pipeline_wait_prior(0);
    __syncthreads();  // all tokens are in shared memory
    of_q.add(q, p.rows);
    of_q.store(s.squares + kColumns, kColumns, s.scratch);
  }
  XK_STEP(cluster_barrier, cluster_sync());  // all blocks have stored their sums

  Stats stats{p.stats + head.record, p.dim};
  bool first_block = cluster_rank() == 0;
  Divisors by{s.norm_k, s.norm_q};
  by.set<kThreads>(
      p.options, p.dim,
      [&](int c) {
        float norm = sqrt(Layout::sum_of_blocks(s.squares, c));
        if (first_block) stats.norms_k()[c] = norm;
        return norm;
      },
      [&](int c) {
        float norm = sqrt(Layout::sum_of_blocks(s.squares, kColumns + c));
        if (first_block) stats.norms_q()[c] = norm;
        return norm;
      });
  __syncthreads();  // all norms are written
  int each = Layout::columns_each(p.dim);
  Columns<kThreads> own(p.dim, cluster_rank() * each, each, s.scratch);
  forward_columns(
      own, p.options, p.dim, p.temperature.get(head.h), by, stats, s.strip,
      [&](int row, int column) { return Layout::sum_of_blocks(s.sums, row * Layout::ld_sums + column); },
      [&](int row, int column, float value) { Layout::give_to_all(s.wide, row * kColumns + column, value); });
  // all blocks have written their columns, and have read this block's sums
  XK_STEP(cluster_barrier, cluster_sync());

  s.narrow_map(0, p.dim, false);
  s.mix(p.to[0], head.all, p.mask, key_value ? q : v, q, s.up, false);
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kFusedThreads, 1) fused_backward_kernel(const __grid_constant__ FusedArgs<T> p) {
  using Layout = FusedLayout<T, kColumns>;
  constexpr int kThreads = kFusedThreads, ld = Layout::ld;
  FusedHead<T> head(p);
  XK_ARENA(arena);
  Layout s(arena, p.rows, 4, 2);
  bool key_value = p.options.key_value != 0;

#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    int x = i == 0 ? 3 : i == 3 ? 1 : (i == 1) == key_value ? 0 : 2;  // second-pass-only operands are loaded last
    load_tile<T, kColumns, kThreads>(s.tile(x), p.x[x], head.all, p.mask);
    if (i % 2 == 1) __pipeline_commit();
  }
#pragma unroll 1
  for (int i = 0; i < 4; ++i) clear_columns<T, kColumns, kThreads>(s.tile(i), p.dim, p.rows);
  Stats stats{p.stats + head.record, p.dim};
  Divisors by{s.norm_k, s.norm_q};
  by.set<kThreads>(
      p.options, p.dim, [&](int c) { return stats.norms_k()[c]; }, [&](int c) { return stats.norms_q()[c]; });
  for (int c = (int)threadIdx.x; c < kColumns; c += kThreads) s.totals[c] = 0;
  __pipeline_wait_prior(1);
  XK_STEP(barrier, __syncthreads());  // first pass's operands, norms, zeros are in shared memory
  {
    Product<T, kColumns, kColumns, kThreads, true> sums;
    sums.multiply(s.tile(key_value ? 0 : 2), ld, s.tile(3), ld, p.rows);
    sums.store(s.sums, Layout::ld_sums);
  }
  XK_STEP(cluster_barrier, cluster_sync());  // all blocks have stored their sums

  int each = Layout::columns_each(p.dim), rank = cluster_rank();
  Columns<kThreads> own(p.dim, rank * each, each, s.scratch);
  float dt = backward_columns(
      own, p.options, p.dim, p.temperature.get(head.h), by, stats, s.strip, s.totals,
      [&](int row, int column) { return Layout::sum_of_blocks(s.sums, row * Layout::ld_sums + column); },
      [&](int row, int column, float of_p, float of_q) {
        Layout::give_to_all(s.wide, row * kColumns + column, of_p);
        Layout::give_to_all(s.wide, kColumns * kColumns + row * kColumns + column, of_q);
      },
      [&](int column, float sum) {
        Layout::give_to_all(s.scale_q, column, norm_term(p.options, sum, stats.norms_q()[column]));
      });
  dt = block_sum<kThreads>(dt, s.scratch);  // its barriers also make the totals visible
#pragma unroll 1
  for (int c = (int)threadIdx.x; c < p.dim; c += kThreads)
    Layout::give_to_all(s.totals_of, rank * kColumns + c, s.totals[c]);
  if (threadIdx.x == 0) peer(s.dt, 0)[rank] = dt;
  __pipeline_wait_prior(0);
  // all columns, totals and tokens are in shared memory, and all blocks have read this block's sums
  XK_STEP(cluster_barrier, cluster_sync());

#pragma unroll 1
  for (int c = (int)threadIdx.x; c < p.dim; c += kThreads) {
    float total = 0;
    for (int r = 0; r < cluster_size(); ++r) total += s.totals_of[r * kColumns + c];
    s.scale_k[c] = norm_term(p.options, total, stats.norms_k()[c]);
    if (key_value) s.scale_q[c] = norm_term(p.options, total, stats.norms_q()[c]);
  }
  if (rank == 0 && threadIdx.x == 0) {
    float total = 0;
    for (int r = 0; r < cluster_size(); ++r) total += s.dt[r];
    p.dtemperature[head.b * p.heads + head.h] = total;
  }

#pragma unroll 1
  for (int i = 0; i < 3; ++i) {  // dq, dk, dv: see maps.h
    bool of_q = i == (key_value ? 0 : 2), transposed = i == 1 || of_q;
    int x = key_value ? 3 - i : i == 2 ? 3 : 1 - i;
    s.narrow_map(of_q, p.dim, transposed);
    s.mix(p.to[i], head.all, p.mask, s.tile(x), s.tile(i), i == 0 ? s.scale_q : s.scale_k,
          i < 2 && p.options.token_norm);
  }
}

}  // namespace xk::cuda
