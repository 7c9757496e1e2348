// The second pass, with tokens loaded directly as mma.sync operands: see fragments.h. Never run on a GPU.
//
// y^T = w^T x^T: the left operand is the map, stored in shared memory in fragment order; the right operand has the
// tokens of x as columns. A warp processes groups of 8 tokens. Of each group, a lane loads a quarter of the features of
// token g, and accumulates an eighth of the features of tokens 2t and 2t + 1 of y. fp32 uses 3xTF32, smallest products
// first.
#pragma once

#include "fragments.h"
#include "mix.h"

namespace xk::cuda {

// One output y = x w, or three: y0 = x1 w0 + s0 x0, y1 = x0 w1 + s1 x1, y2 = x2 w2; at most kDim features each.
template <class T, int kDim, int kOutputs>
struct FragmentMix {
  static constexpr bool kTf32 = sizeof(T) == 4;
  static constexpr int kThreads = 128;
  using X = Pieces<T, kDim, 4>;
  using Y = Pieces<T, kDim, 8>;
  static constexpr int kPieceBytes = 4 * (X::kPiece > Y::kPiece ? X::kPiece : Y::kPiece);
  static constexpr int kSteps = kDim / (kTf32 ? 8 : 16), kTiles = kDim / 16;  // steps over features of x; tiles of y
  static constexpr int kParts = kTf32 ? 2 : 1;                                // 3xTF32: high and low
  static constexpr int kMap = kSteps * kTiles * kParts * 32 * 4;              // words of a map
  static constexpr int kBytes = kDim * (int)sizeof(T);
  static constexpr int kGroups = kOutputs == 1 ? (kBytes > 64 ? 2 : 4) : (kBytes > 64 ? 1 : 2);  // of 8 tokens
  // per SM, limited by registers
  static constexpr int kBlocks = kOutputs == 3  ? (kBytes == 128 || kBytes == 32 ? 3 : 2)
                                 : kBytes > 192 ? 2
                                 : kBytes > 128 ? 3
                                                : 4;
  static constexpr int kTokens = 8 * kGroups, kStride = kTokens * kThreads / 32;  // per warp; per block
};

template <class T, int kDim, int kOutputs>
struct FragmentMixLayout {
  Shared<uint32_t> maps;   // (outputs, kMap)
  Shared<float> up, down;  // (outputs, kDim): column scales, only for fp16

  __host__ __device__ explicit FragmentMixLayout(Arena& arena) {
    maps = arena.take<uint32_t>(kOutputs * FragmentMix<T, kDim, kOutputs>::kMap);
    up = arena.take<float>(kScaled<T> ? kOutputs * kDim : 0);
    down = arena.take<float>(kScaled<T> ? kOutputs * kDim : 0);
  }
};

// One element of an fp32 output, recomputed without tensor cores.
__device__ inline void mix_again(const MixArgs<float>& p, int o, int64_t b, int64_t h, int64_t token, int c) {
  const MixOutput<float>& out = p.out[o];
  const Operand& x = p.x[out.operand[0]];
  const float* from = x.head<float>(b, h) + token * x.stride_n;
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < x.features; ++i) sum += from[i] * out.weight[0].template get<float>(b, h, i, c);
  if (out.add != kNone)
    sum += out.scale.template get<float>(b, h, c) * p.x[out.add].head<float>(b, h)[token * p.x[out.add].stride_n + c];
  out.to.token(b, h, token)[c] = sum;
}

// A block processes one chunk of the tokens of one (batch, head).
template <class T, int kDim, int kOutputs>
__global__ void __launch_bounds__(FragmentMix<T, kDim, kOutputs>::kThreads, FragmentMix<T, kDim, kOutputs>::kBlocks)
    fragment_mix_kernel(const __grid_constant__ MixArgs<T> p) {
  using Sizes = FragmentMix<T, kDim, kOutputs>;
  using X = typename Sizes::X;
  using Y = typename Sizes::Y;
  constexpr int kThreads = Sizes::kThreads, kSteps = Sizes::kSteps, kTiles = Sizes::kTiles, kGroups = Sizes::kGroups;
  Lane lane;
  int64_t block = blockIdx.x;
  int64_t h = block % p.heads;
  block /= p.heads;
  int64_t part = block % p.parts, b = block / p.parts, begin = part * p.chunk;
  int tokens = (int)(p.tokens - begin < p.chunk ? p.tokens - begin : p.chunk), dim = p.x[0].features;

  XK_ARENA(arena);
  FragmentMixLayout<T, kDim, kOutputs> s(arena);
  if constexpr (kScaled<T>) {
#pragma unroll 1
    for (int o = 0; o < kOutputs; ++o)
      scale_columns<kDim, kThreads>(s.up + o * kDim, s.down + o * kDim, [&](int c) {
        float largest = 0;
        for (int i = 0; i < dim && c < dim; ++i)
          largest = fmaxf(largest, fabsf(p.out[o].weight[0].template get<T>(b, h, i, c)));
        return largest;
      });
    __syncthreads();  // all scales are written
  }
#pragma unroll 1
  for (int at = (int)threadIdx.x; at < kOutputs * kTiles * kSteps * 32; at += kThreads) {
    // the fragment of lane (g, t): rows of a tile are features of y, columns of a step are features of x
    int g = at % 32 / 4, t = at % 4, rest = at / 32, step = rest % kSteps, tile = rest / kSteps % kTiles;
    int o = rest / kSteps / kTiles;
    const Weight& w = p.out[o].weight[0];
    auto get = [&](int number, int row) {
      int in = X::feature(t, number), to = Y::feature(g, 2 * tile + row);
      float value = in < dim && to < dim ? w.template get<T>(b, h, in, to) : 0.f;
      if constexpr (kScaled<T>) value *= s.up[o * kDim + to];
      return value;
    };
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      int first = 2 * step + r / 2, place = Sizes::kParts * 4 * at + r;
      if constexpr (Sizes::kTf32) {
        uint32_t high, low;
        split_into_tf32(__float_as_uint(get(first, r % 2)), high, low);
        s.maps[place] = high;
        s.maps[place + 4] = low;
      } else {
        s.maps[place] = narrow_pair<T>(get(2 * first, r % 2), get(2 * first + 1, r % 2));
      }
    }
  }
  XK_STEP(barrier, __syncthreads());  // all threads have stored their part of the maps

  const char *from[kOutputs], *own[kOutputs];
  char* to[kOutputs];
  int step_x[kOutputs], step_y[kOutputs];  // token strides in bytes
  float scale[kOutputs][Y::kNumbers] = {}, down[kOutputs][Y::kNumbers] = {};
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const T* first = p.x[o].template head<T>(b, h) + begin * p.x[o].stride_n;
    from[o] = reinterpret_cast<const char*>(first + X::feature(lane.t, 0));
    step_x[o] = (int)(p.x[o].stride_n * (int64_t)sizeof(T));
    step_y[o] = (int)(p.out[o].to.stride_n * (int64_t)sizeof(T));
    own[o] = reinterpret_cast<const char*>(first + Y::feature(lane.g, 0));
    to[o] = reinterpret_cast<char*>(p.out[o].to.token(b, h, begin) + Y::feature(lane.g, 0));
#pragma unroll
    for (int i = 0; i < Y::kNumbers; ++i) {
      int c = Y::feature(lane.g, i);
      if constexpr (kScaled<T>) down[o][i] = s.down[o * kDim + c];
      if (kOutputs == 3 && o < 2 && c < dim) scale[o][i] = p.out[o].scale.template get<T>(b, h, c);
    }
  }
  uint32_t x[kOutputs][kGroups][X::kWords] = {};
  auto fetch = [&](int token) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o)
#pragma unroll
      for (int r = 0; r < kGroups; ++r) {
        int n = token + 8 * r + lane.g;
        bool there = true;
        XK_STEP(tail_mask, there = n < tokens);
        X::load(x[o][r], from[o] + (int64_t)n * step_x[o], lane.t, dim, there);
      }
  };
  float finite = 0;  // fp32: sum of 0 * y over all results; NaN if one is not finite
  int first = lane.warp * Sizes::kTokens;
  fetch(first);
#pragma unroll 1
  for (int token = first; token < tokens; token += Sizes::kStride) {
    uint32_t now[kOutputs][kGroups][X::kWords];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o)
#pragma unroll
      for (int r = 0; r < kGroups; ++r)
#pragma unroll
        for (int i = 0; i < X::kWords; ++i) now[o][r][i] = x[o][r][i];
    fetch(token + Sizes::kStride);  // prefetch: these loads overlap with the products of the current tokens
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      constexpr int kFactor[3] = {kOutputs == 3 ? 1 : 0, 0, 2};
      uint32_t high[kGroups][X::kWords], low[kGroups][X::kWords];
#pragma unroll
      for (int r = 0; r < kGroups; ++r)
#pragma unroll
        for (int i = 0; i < X::kWords; ++i) {
          high[r][i] = now[kFactor[o]][r][i];
          if constexpr (Sizes::kTf32) split_into_tf32(high[r][i], high[r][i], low[r][i]);
        }
      float y[kGroups][kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          alignas(16) uint32_t w[Sizes::kParts][4];
          int at = ((o * kTiles + m) * kSteps + step) * 32 + (int)threadIdx.x % 32;
#pragma unroll
          for (int i = 0; i < Sizes::kParts; ++i) load_fragment_words(w[i], &s.maps[(at * Sizes::kParts + i) * 4]);
#pragma unroll
          for (int r = 0; r < kGroups; ++r) {
            if constexpr (Sizes::kTf32) {
              if (step == 0)
                mma<T, true>(y[r][m], w[0], low[r][2 * step], low[r][2 * step + 1]);
              else
                mma<T>(y[r][m], w[0], low[r][2 * step], low[r][2 * step + 1]);
              mma<T>(y[r][m], w[1], high[r][2 * step], high[r][2 * step + 1]);
            }
            if (!Sizes::kTf32 && step == 0)
              mma<T, true>(y[r][m], w[0], high[r][2 * step], high[r][2 * step + 1]);
            else
              mma<T>(y[r][m], w[0], high[r][2 * step], high[r][2 * step + 1]);
          }
        }
        __syncwarp();  // prevents early loads of operands of later tiles, which would need more registers
      }
      bool add = kOutputs == 3 && o < 2;
#pragma unroll
      for (int r = 0; r < kGroups; ++r)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          int n = token + 8 * r + 2 * lane.t + u;
          bool inside = n < tokens;
          alignas(16) uint32_t words[Y::kWords] = {};
          if (add) Y::load(words, own[o] + (int64_t)n * step_x[o], lane.g, dim, inside);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            float pair[2] = {y[r][m][u], y[r][m][2 + u]};
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if constexpr (kScaled<T>) pair[e] *= down[o][2 * m + e];
              if (add) pair[e] += scale[o][2 * m + e] * number_of<T>(words, 2 * m + e);
              if constexpr (Sizes::kTf32) finite += 0 * pair[e];
            }
            if constexpr (Sizes::kTf32)
              words[2 * m] = __float_as_uint(pair[0]), words[2 * m + 1] = __float_as_uint(pair[1]);
            else
              words[m] = narrow_pair<T>(pair[0], pair[1]);
          }
          Y::store(to[o] + (int64_t)n * step_y[o], words, lane.g, dim, inside);
        }
    }
  }
  if constexpr (Sizes::kTf32)
    if (finite != 0)
#pragma unroll 1
      for (int group = first; group < tokens; group += Sizes::kStride)
#pragma unroll 1
        for (int i = 0; i < 2 * kGroups * kOutputs * Y::kNumbers; ++i) {
          int number = i % Y::kNumbers, rest = i / Y::kNumbers, o = rest % kOutputs, place = rest / kOutputs;
          int n = group + place / 2 * 8 + 2 * lane.t + place % 2, c = Y::feature(lane.g, number);
          if (n < tokens && c < dim) mix_again(p, o, b, h, begin + n, c);
        }
}

}  // namespace xk::cuda
