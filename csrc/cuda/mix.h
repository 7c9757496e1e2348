// The second pass: tokens times maps, for up to three outputs of the same tokens.
#pragma once

#include "product.h"
#include "tokens.h"
#include "weights.h"

namespace xk::cuda {

constexpr int kOperands = 4, kOutputs = 3, kNone = -1;

// y[n] = sum over terms of x[n] w, followed by these steps, each of which is skipped if its operand is absent (kNone):
//   r = row_norm:  y[n] /= |x_r[n]|
//   p = project:   y[n] = (y[n] - u (u . y[n])) / |x_p[n]|  with u = x_p[n] / |x_p[n]|
//   bias:          y[n] += bias
//   a = add:       y[n] += scale * x_a[n]
template <class T>
struct MixOutput {
  Result<T> to;
  int32_t terms;
  int32_t operand[2];
  Weight weight[2];
  int32_t row_norm, project, add;
  Vector scale, bias;  // an absent scale is 1
};

template <class T>
struct MixArgs {
  Operand x[kOperands];
  int32_t operands, outputs;
  MixOutput<T> out[kOutputs];
  Mask mask;
  int64_t batch, heads, tokens, parts, chunk;
  int32_t resident;  // all maps stay in shared memory; otherwise one slice of a map at a time
  int32_t stages;    // 2: the next tokens are loaded while the current ones are used
  double eps;
};

constexpr int kMixThreads = 128;

template <class Math, int kColumns>
struct MixLayout {
  using E = Element<Math>;
  using S = Sum<E>;
  static constexpr int kRows = (sizeof(E) == 8 ? 2048 : 4096) / kColumns;
  static constexpr int kMost = (sizeof(E) == 8 ? 2048 : sizeof(E) == 4 ? 4096 : 8192) / kColumns;
  static constexpr int kDepth = kColumns < kMost ? kColumns : kMost;  // rows of a slice of a map
  static constexpr int kTileSize = kRows * padded<E>(kColumns), kMapSize = kDepth * padded<E>(kColumns);
  // Padding: the 8 rows that a warp stores at once lie in different banks.
  static constexpr int ld_y = kColumns + 8;
  Shared<E> x;      // (stages, operands, kRows, kColumns)
  Shared<E> maps;   // (slices, kDepth, kColumns)
  Shared<S> y;      // (kRows, kColumns)
  Shared<S> scale;  // (outputs, kColumns), like bias, up and down
  Shared<S> bias, up, down;
  Shared<S> norms;  // (operands, kRows)
  Shared<S> along;  // (kRows)

  __host__ __device__ MixLayout(Arena& arena, int operands, int outputs, int slices, int stages) {
    x = arena.take<E>(stages * operands * kTileSize);
    maps = arena.take<E>(slices * kMapSize);
    y = arena.take<S>(kRows * ld_y);
    scale = arena.take<S>(outputs * kColumns);
    bias = arena.take<S>(outputs * kColumns);
    up = arena.take<S>(kScaled<E> ? outputs * kColumns : 0);
    down = arena.take<S>(kScaled<E> ? outputs * kColumns : 0);
    norms = arena.take<S>(operands * kRows);
    along = arena.take<S>(kRows);
  }
};

// Number of slices of the maps of all outputs.
template <class Math, int kColumns, class T>
__host__ __device__ int slices_of(const MixArgs<T>& p) {
  int slices = 0;
  for (int o = 0; o < p.outputs; ++o)
    for (int t = 0; t < p.out[o].terms; ++t)
      slices += (int)cdiv(p.out[o].weight[t].features, MixLayout<Math, kColumns>::kDepth);
  return slices;
}

// A block processes all features of one chunk of the tokens of one (batch, head).
template <class T, class Math, int kColumns>
__global__ void __launch_bounds__(kMixThreads, 3) mix_kernel(const __grid_constant__ MixArgs<T> p) {
  using E = Element<Math>;
  using S = Sum<T>;
  using Layout = MixLayout<Math, kColumns>;
  constexpr int kThreads = kMixThreads, kRows = Layout::kRows, kDepth = Layout::kDepth;
  constexpr int ld = padded<E>(kColumns), ld_y = Layout::ld_y;
  int64_t block = blockIdx.x;
  int64_t h = block % p.heads;
  block /= p.heads;
  int64_t part = block % p.parts, b = block / p.parts;

  XK_ARENA(arena);
  Layout s(arena, p.operands, p.outputs, p.resident ? slices_of<Math, kColumns>(p) : 1, p.stages);
  Rows all{b, h, part * p.chunk, part * p.chunk + p.chunk < p.tokens ? part * p.chunk + p.chunk : p.tokens, kRows};

  auto tile = [&](int stage, int operand) { return s.x + (stage * p.operands + operand) * Layout::kTileSize; };
  auto load_slice = [&](int o, int t, int first, Shared<E> to) {
    const Weight& w = p.out[o].weight[t];
    load_map<T, E, kDepth, kColumns, kThreads>(to, w.features, p.out[o].to.features, first, w.stride_out == 1,
                                               s.up + o * kColumns,
                                               [&](int in, int out) { return w.template get<T>(b, h, in, out); });
  };

#pragma unroll 1
  for (int stage = 0; stage < p.stages; ++stage)
#pragma unroll 1
    for (int x = 0; x < p.operands; ++x) clear_columns<E, kColumns, kThreads>(tile(stage, x), p.x[x].features, kRows);
#pragma unroll 1
  for (int o = 0; o < p.outputs; ++o) {
    const MixOutput<T>& out = p.out[o];
#pragma unroll 1
    for (int c = (int)threadIdx.x; c < out.to.features; c += kThreads) {
      s.scale[o * kColumns + c] = out.scale.data ? out.scale.template get<T>(b, h, c) : S(1);
      s.bias[o * kColumns + c] = out.bias.data ? out.bias.template get<T>(b, h, c) : S(0);
    }
    if constexpr (kScaled<E>)
      scale_columns<kColumns, kThreads>(s.up + o * kColumns, s.down + o * kColumns, [&](int c) {
        float largest = 0;
        for (int t = 0; t < out.terms && c < out.to.features; ++t)
          for (int i = 0; i < out.weight[t].features; ++i)
            largest = fmaxf(largest, fabsf(out.weight[t].template get<T>(b, h, i, c)));
        return largest;
      });
  }
  __syncthreads();  // all scales are written
  if (p.resident) {
    int slice = 0;
#pragma unroll 1
    for (int o = 0; o < p.outputs; ++o)
#pragma unroll 1
      for (int t = 0; t < p.out[o].terms; ++t)
#pragma unroll 1
        for (int first = 0; first < p.out[o].weight[t].features; first += kDepth)
          load_slice(o, t, first, s.maps + slice++ * Layout::kMapSize);
  }

  int64_t ahead = (p.stages - 1) * kRows;  // 2 stages: loads are one step ahead
  int stage = p.stages - 1;
  for (int64_t begin = all.begin - ahead; begin < all.end; begin += kRows, stage ^= p.stages - 1) {
    Rows r = all, next = all;
    r.begin = begin;
    next.begin = begin + ahead;
#pragma unroll 1
    for (int x = 0; x < p.operands && next.begin < all.end; ++x)
      load_tile<T, E, kColumns, kThreads>(tile(stage ^ (p.stages - 1), x), p.x[x], 0, next, p.mask);
    __pipeline_commit();
    if (begin < all.begin) continue;
#pragma unroll 1
    for (int x = 0; x < p.operands; ++x) {
      bool wanted = false;
      for (int o = 0; o < p.outputs; ++o) wanted |= p.out[o].row_norm == x || p.out[o].project == x;
      if (wanted) row_norms<T, kThreads>(s.norms + x * kRows, p.x[x], r, p.mask);
    }
    if (p.stages > 1)
      __pipeline_wait_prior(1);
    else
      __pipeline_wait_prior(0);
    int slice = 0;
    for (int o = 0; o < p.outputs; ++o) {
      const MixOutput<T>& out = p.out[o];
      Product<Math, kRows, kColumns, kThreads, false> y;
      for (int t = 0; t < out.terms; ++t)
        for (int first = 0; first < out.weight[t].features; first += kDepth, ++slice) {
          Shared<E> map = s.maps + (p.resident ? slice : 0) * Layout::kMapSize;
          if (!p.resident) {
            __syncthreads();  // all threads have read the previous slice
            load_slice(o, t, first, map);
          }
          XK_STEP(barrier, __syncthreads());  // all threads have loaded tokens and maps, and have read y
          int left = (out.weight[t].features - first + 15) / 16 * 16;  // padded by zeros
          y.multiply(tile(stage, out.operand[t]) + first, ld, map, ld, left < kDepth ? left : kDepth);
        }
      y.store(s.y, ld_y);
      __syncthreads();  // all threads have stored their products

      auto products = [&](auto count, int row, int c, S* value) {
        constexpr int kCount = decltype(count)::value;
        load_numbers<kCount>(value, &s.y[row * ld_y + c]);
        if constexpr (kScaled<E>) {
          alignas(16) S down[kCount];
          load_numbers<kCount>(down, &s.down[o * kColumns + c]);
          for (int i = 0; i < kCount; ++i) value[i] *= down[i];
        }
        if (out.row_norm != kNone) {
          S norm = clamp_norm(s.norms[out.row_norm * kRows + row], (S)p.eps);
          for (int i = 0; i < kCount; ++i) value[i] /= norm;
        }
      };
      // u = x / |x|: the derivative of u subtracts u (u . y) from y
      auto units = [&](auto count, int row, int c, S* value) {
        constexpr int kCount = decltype(count)::value;
        alignas(16) E x[kCount];
        load_numbers<kCount>(x, &tile(stage, out.project)[row * ld + c]);
        S norm = clamp_norm(s.norms[out.project * kRows + row], (S)p.eps);
        for (int i = 0; i < kCount; ++i) value[i] = (S)widen(x[i]) / norm;
      };
      if (out.project != kNone) {
        for (int row = (int)threadIdx.x / 32; row < kRows; row += kThreads / 32) {
          S sum = 0;
          for (int c = (int)threadIdx.x % 32; c < out.to.features; c += 32) {
            S unit[1], value[1];
            units(Count<1>{}, row, c, unit);
            products(Count<1>{}, row, c, value);
            sum += unit[0] * value[0];
          }
          sum = warp_sum(sum);
          if (threadIdx.x % 32 == 0) s.along[row] = s.norms[out.project * kRows + row] <= (S)p.eps ? S(0) : sum;
        }
        __syncthreads();  // the sums of all rows are written
      }
      store_rows<T, kThreads>(out.to, r, p.mask, [&](auto count, int row, int c, S* value) {
        constexpr int kCount = decltype(count)::value;
        products(count, row, c, value);
        if (out.project != kNone) {
          S unit[kCount], along = s.along[row], norm = clamp_norm(s.norms[out.project * kRows + row], (S)p.eps);
          units(count, row, c, unit);
          for (int i = 0; i < kCount; ++i) value[i] = (value[i] - unit[i] * along) / norm;
        }
        if (out.bias.data) {
          alignas(16) S bias[kCount];
          load_numbers<kCount>(bias, &s.bias[o * kColumns + c]);
          for (int i = 0; i < kCount; ++i) value[i] += bias[i];
        }
        if (out.add != kNone) {
          alignas(16) S scale[kCount];
          alignas(16) E x[kCount];
          load_numbers<kCount>(scale, &s.scale[o * kColumns + c]);
          load_numbers<kCount>(x, &tile(stage, out.add)[row * ld + c]);
          for (int i = 0; i < kCount; ++i) value[i] += scale[i] * (S)widen(x[i]);
        }
      });
    }
    __syncthreads();  // all threads have read these tokens
  }
  __pipeline_wait_prior(0);
}

}  // namespace xk::cuda
