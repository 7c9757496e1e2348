// The D x D algebra between the two passes as separate kernels, for tokens that do not fit in shared memory.
#pragma once

#include "maps.h"
#include "weights.h"

namespace xk::cuda {

constexpr int kMapThreads = 256, kMapColumns = 32;  // kMapColumns: columns of a map per block

template <class S>
struct MapArgs {
  MapOptions options;
  PerHead temperature;
  int64_t batch, heads, parts;
  int32_t dim;
  const S* partial;  // (parts, batch, heads, step): Gram matrix; in forward, then sums of squares of k and of q
  int64_t step;
  S* stats;
  S *p, *q;         // (batch, heads, dim, dim); forward writes only p, the map
  S* scale_q;       // (batch, heads, dim); key_value: (pieces, batch, heads, dim), like scale_k
  S* scale_k;       // (pieces, batch, heads, dim): one piece from each block of columns
  S* dtemperature;  // (pieces, batch, heads)
};

template <class S>
struct MapLayout {
  Shared<S> norm_k, norm_q, totals, strip, scratch;
  __host__ __device__ MapLayout(Arena& arena, int dim) {
    norm_k = arena.take<S>(dim);
    norm_q = arena.take<S>(dim);
    totals = arena.take<S>(dim);
    strip = arena.take<S>(dim * kMapColumns);
    scratch = arena.take<S>(kMapThreads);
  }
};

template <class S>
struct MapBlock {
  int64_t b, h, head, heads;
  int piece;

  __device__ explicit MapBlock(const MapArgs<S>& p) {
    int pieces = (int)cdiv(p.dim, kMapColumns);
    head = blockIdx.x / pieces;
    piece = (int)(blockIdx.x % pieces);
    b = head / p.heads;
    h = head % p.heads;
    heads = p.batch * p.heads;
  }
  __device__ S sum_of_parts(const MapArgs<S>& p, int64_t at) const {
    const S* from = p.partial + head * p.step + at;
    S total = *from;
    for (int64_t part = 1; part < p.parts; ++part) total += from[part * heads * p.step];
    return total;
  }
};

template <class S>
__global__ void __launch_bounds__(kMapThreads, 2) map_forward_kernel(const __grid_constant__ MapArgs<S> p) {
  MapBlock<S> at(p);
  XK_ARENA(arena);
  MapLayout<S> s(arena, p.dim);
  Stats<S> stats{p.stats + at.head * (p.dim * p.dim + 2 * p.dim), p.dim};
  Divisors<S> by{s.norm_k, s.norm_q};
  auto norm = [&](int64_t where, S* to, int c) {
    S x = p.options.token_norm ? sqrt(at.sum_of_parts(p, where + c)) : S(0);
    if (at.piece == 0) to[c] = x;
    return x;
  };
  by.template set<kMapThreads>(
      p.options, p.dim, [&](int c) { return norm(p.dim * p.dim, stats.norms_k(), c); },
      [&](int c) { return norm(p.dim * p.dim + p.dim, stats.norms_q(), c); });
  __syncthreads();  // all norms are written
  Columns<S, kMapThreads> own(p.dim, at.piece * kMapColumns, kMapColumns, s.scratch);
  S* map = p.p + at.head * p.dim * p.dim;
  forward_columns(
      own, p.options, p.dim, p.temperature.template get<S>(at.h), by, stats, s.strip,
      [&](int row, int column) { return at.sum_of_parts(p, row * p.dim + column); },
      [&](int row, int column, S value) { map[row * p.dim + column] = value; });
}

template <class S>
__global__ void __launch_bounds__(kMapThreads, 2) map_backward_kernel(const __grid_constant__ MapArgs<S> p) {
  MapBlock<S> at(p);
  XK_ARENA(arena);
  MapLayout<S> s(arena, p.dim);
  Stats<S> stats{p.stats + at.head * (p.dim * p.dim + 2 * p.dim), p.dim};
  Divisors<S> by{s.norm_k, s.norm_q};
  by.template set<kMapThreads>(
      p.options, p.dim, [&](int c) { return stats.norms_k()[c]; }, [&](int c) { return stats.norms_q()[c]; });
  for (int c = (int)threadIdx.x; c < p.dim; c += kMapThreads) s.totals[c] = 0;
  __syncthreads();  // all norms and zeros are written
  Columns<S, kMapThreads> own(p.dim, at.piece * kMapColumns, kMapColumns, s.scratch);
  S *map_p = p.p + at.head * p.dim * p.dim, *map_q = p.q + at.head * p.dim * p.dim;
  S dt = backward_columns(
      own, p.options, p.dim, p.temperature.template get<S>(at.h), by, stats, s.strip, s.totals,
      [&](int row, int column) { return at.sum_of_parts(p, row * p.dim + column); },
      [&](int row, int column, S of_p, S of_q) {
        map_p[row * p.dim + column] = of_p;
        map_q[row * p.dim + column] = of_q;
      },
      [&](int column, S sum) {
        p.scale_q[at.head * p.dim + column] = norm_term(p.options, sum, stats.norms_q()[column]);
      });
  dt = block_sum<S, kMapThreads>(dt, s.scratch);  // its barriers also make the totals visible
  int64_t piece = (at.piece * at.heads + at.head) * p.dim;
  for (int c = (int)threadIdx.x; c < p.dim; c += kMapThreads) {
    p.scale_k[piece + c] = norm_term(p.options, s.totals[c], stats.norms_k()[c]);
    if (p.options.key_value) p.scale_q[piece + c] = norm_term(p.options, s.totals[c], stats.norms_q()[c]);
  }
  if (threadIdx.x == 0) p.dtemperature[at.piece * at.heads + at.head] = dt;
}

// to[h] = sum over i of parts[i, h], in a fixed order: dtemperature, summed over pieces and batch.
template <class S>
struct TemperatureArgs {
  const S* parts;  // (count, heads)
  int64_t count, heads;
  PerHead to;
};

template <class S>
__global__ void __launch_bounds__(kMapThreads) temperature_kernel(const __grid_constant__ TemperatureArgs<S> p) {
  for (int64_t h = (int64_t)blockIdx.x * kMapThreads + threadIdx.x; h < p.heads;
       h += (int64_t)gridDim.x * kMapThreads) {
    S total = 0;
    for (int64_t i = 0; i < p.count; ++i) total += p.parts[i * p.heads + h];
    p.to.set(h, total);
  }
}

}  // namespace xk::cuda
