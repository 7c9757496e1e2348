// Kernels of heads.h, and their launches.
#include "heads.h"
#include "launch.h"

namespace xk::cuda {

struct MapLayout {
  Shared<float> norm_k, norm_q, totals, strip, scratch;
  __host__ __device__ MapLayout(Arena& arena, int dim) {
    norm_k = arena.take<float>(dim);
    norm_q = arena.take<float>(dim);
    totals = arena.take<float>(dim);
    strip = arena.take<float>(dim * kMapColumns);
    scratch = arena.take<float>(kMapThreads);
  }
};

struct MapBlock {
  int64_t b, h, head, heads;
  int piece;

  __device__ explicit MapBlock(const MapArgs& p) {
    int pieces = (int)cdiv(p.dim, kMapColumns);
    head = blockIdx.x / pieces;
    piece = (int)(blockIdx.x % pieces);
    b = head / p.heads;
    h = head % p.heads;
    heads = p.batch * p.heads;
  }
  __device__ float sum_of_parts(const MapArgs& p, int64_t at) const {
    const float* from = p.partial + head * p.step + at;
    float total = *from;
    for (int64_t part = 1; part < p.parts; ++part) total += from[part * heads * p.step];
    return total;
  }
};

__global__ void __launch_bounds__(kMapThreads, 2) map_forward_kernel(const __grid_constant__ MapArgs p) {
  MapBlock at(p);
  XK_ARENA(arena);
  MapLayout s(arena, p.dim);
  Stats stats{p.stats + at.head * (p.dim * p.dim + 2 * p.dim), p.dim};
  Divisors by{s.norm_k, s.norm_q};
  auto norm = [&](int64_t where, float* to, int c) {
    float x = p.options.token_norm ? sqrt(at.sum_of_parts(p, where + c)) : 0.f;
    if (at.piece == 0) to[c] = x;
    return x;
  };
  by.set<kMapThreads>(
      p.options, p.dim, [&](int c) { return norm(p.dim * p.dim, stats.norms_k(), c); },
      [&](int c) { return norm(p.dim * p.dim + p.dim, stats.norms_q(), c); });
  __syncthreads();  // all norms are written
  Columns<kMapThreads> own(p.dim, at.piece * kMapColumns, kMapColumns, s.scratch);
  float* map = p.p + at.head * p.dim * p.dim;
  forward_columns(
      own, p.options, p.dim, p.temperature.get(at.h), by, stats, s.strip,
      [&](int row, int column) { return at.sum_of_parts(p, row * p.dim + column); },
      [&](int row, int column, float value) { map[row * p.dim + column] = value; });
}

__global__ void __launch_bounds__(kMapThreads, 2) map_backward_kernel(const __grid_constant__ MapArgs p) {
  MapBlock at(p);
  XK_ARENA(arena);
  MapLayout s(arena, p.dim);
  Stats stats{p.stats + at.head * (p.dim * p.dim + 2 * p.dim), p.dim};
  Divisors by{s.norm_k, s.norm_q};
  by.set<kMapThreads>(
      p.options, p.dim, [&](int c) { return stats.norms_k()[c]; }, [&](int c) { return stats.norms_q()[c]; });
  for (int c = (int)threadIdx.x; c < p.dim; c += kMapThreads) s.totals[c] = 0;
  __syncthreads();  // all norms and zeros are written
  Columns<kMapThreads> own(p.dim, at.piece * kMapColumns, kMapColumns, s.scratch);
  float *map_p = p.p + at.head * p.dim * p.dim, *map_q = p.q + at.head * p.dim * p.dim;
  float dt = backward_columns(
      own, p.options, p.dim, p.temperature.get(at.h), by, stats, s.strip, s.totals,
      [&](int row, int column) { return at.sum_of_parts(p, row * p.dim + column); },
      [&](int row, int column, float of_p, float of_q) {
        map_p[row * p.dim + column] = of_p;
        map_q[row * p.dim + column] = of_q;
      },
      [&](int column, float sum) {
        p.scale_q[at.head * p.dim + column] = norm_term(p.options, sum, stats.norms_q()[column]);
      });
  dt = block_sum<kMapThreads>(dt, s.scratch);  // its barriers also make the totals visible
  int64_t piece = (at.piece * at.heads + at.head) * p.dim;
  for (int c = (int)threadIdx.x; c < p.dim; c += kMapThreads) {
    p.scale_k[piece + c] = norm_term(p.options, s.totals[c], stats.norms_k()[c]);
    if (p.options.key_value) p.scale_q[piece + c] = norm_term(p.options, s.totals[c], stats.norms_q()[c]);
  }
  if (threadIdx.x == 0) p.dtemperature[at.piece * at.heads + at.head] = dt;
}

__global__ void __launch_bounds__(kMapThreads) temperature_kernel(const __grid_constant__ TemperatureArgs p) {
  for (int64_t h = (int64_t)blockIdx.x * kMapThreads + threadIdx.x; h < p.heads;
       h += (int64_t)gridDim.x * kMapThreads) {
    float total = 0;
    for (int64_t i = 0; i < p.count; ++i) total += p.parts[i * p.heads + h];
    p.to.set(h, total);
  }
}

static void launch_map(const char* name, void (*kernel)(MapArgs), const MapArgs& p, void* stream) {
  Arena arena(nullptr);
  MapLayout(arena, p.dim);
  launch(name, kernel, p, p.batch * p.heads * cdiv(p.dim, kMapColumns), kMapThreads, arena.used(), stream);
}

void launch_map_forward(const MapArgs& p, void* stream) { launch_map("map_forward", map_forward_kernel, p, stream); }
void launch_map_backward(const MapArgs& p, void* stream) { launch_map("map_backward", map_backward_kernel, p, stream); }
void launch_temperature(const TemperatureArgs& p, void* stream) {
  int64_t blocks = cdiv(p.heads, kMapThreads);
  launch("temperature", temperature_kernel, p, blocks < 1024 ? blocks : 1024, kMapThreads, 0, stream);
}

}  // namespace xk::cuda
