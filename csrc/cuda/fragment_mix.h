// The second pass, with tokens loaded directly as mma.sync operands: see fragments.h. Never run on a GPU.
//
// y^T = w^T x^T: the left operand is the map, stored in shared memory in fragment order; the right operand has the
// tokens of x as columns. A warp processes groups of 8 tokens. Of each group, a lane loads a quarter of the features of
// token g, and accumulates an eighth of the features of tokens 2t and 2t + 1 of y. fp32 uses 3xTF32, smallest products
// first.
#pragma once

#include "fragments.h"
#include "tokens.h"
#include "weights.h"

namespace xk::cuda {

// y = x w + scale * add for one result; x, add and y have the same number of features.
template <class T>
struct MixOutput {
  Operand x, add;
  const float* map;    // (batch, heads, dim, dim): w, or its transpose if `transposed`
  const float* scale;  // (pieces, batch, heads, dim), to be summed over the pieces
  int32_t transposed, pieces;
  Result<T> to;
};

template <class T>
struct MixArgs {
  MixOutput<T> out[3];
  Mask mask;  // only for clear_kernel
  int64_t batch, heads, tokens, parts, chunk;
  int32_t outputs, dim;
};

// kOutputs results of at most kDim features each, of which the first kAdds have a term `scale * add`.
template <class T, int kDim, int kOutputs, int kAdds>
struct FragmentMix {
  static constexpr bool kTf32 = sizeof(T) == 4;
  static constexpr int kThreads = 128;
  using X = Pieces<T, kDim, 4>;
  using Y = Pieces<T, kDim, 8>;
  static constexpr int kSteps = kDim / (kTf32 ? 8 : 16), kTiles = kDim / 16;  // steps over features of x; tiles of y
  static constexpr int kParts = kTf32 ? 2 : 1;                                // 3xTF32: high and low
  static constexpr int kMap = kSteps * kTiles * kParts * 32 * 4;              // words of a map
  static constexpr int kBytes = kDim * (int)sizeof(T);
  static constexpr int kGroups = kAdds == 0 ? (kBytes > 64 ? 2 : 4) : (kBytes > 64 ? 1 : 2);  // of 8 tokens
  // per SM, limited by registers
  static constexpr int kBlocks = kOutputs == 3  ? (kBytes == 128 || kBytes == 32 ? 3 : 2)
                                 : kBytes > 192 ? 2
                                 : kBytes > 128 ? 3
                                                : 4;
  static constexpr int kTokens = 8 * kGroups, kStride = kTokens * kThreads / 32;  // per warp; per block
};

template <class T, int kDim, int kOutputs, int kAdds>
struct FragmentMixLayout {
  Shared<uint32_t> maps;   // (outputs, kMap)
  Shared<float> up, down;  // (outputs, kDim): column scales, only for fp16

  __host__ __device__ explicit FragmentMixLayout(Arena& arena) {
    maps = arena.take<uint32_t>(kOutputs * FragmentMix<T, kDim, kOutputs, kAdds>::kMap);
    up = arena.take<float>(kScaled<T> ? kOutputs * kDim : 0);
    down = arena.take<float>(kScaled<T> ? kOutputs * kDim : 0);
  }
};

template <class T>
__device__ float element_of_map(const MixArgs<T>& p, int o, int64_t head, int in, int out) {
  const float* map = p.out[o].map + head * p.dim * p.dim;
  return p.out[o].transposed ? map[out * p.dim + in] : map[in * p.dim + out];
}

template <class T>
__device__ float element_of_scale(const MixArgs<T>& p, int o, int64_t head, int c) {
  float sum = 0;
#pragma unroll 1
  for (int piece = 0; piece < p.out[o].pieces; ++piece)
    sum += p.out[o].scale[(piece * p.batch * p.heads + head) * p.dim + c];
  return sum;
}

// One element of an fp32 result, computed without tensor cores.
__device__ inline void mix_again(const MixArgs<float>& p, int o, int64_t b, int64_t h, int64_t token, int c, bool add) {
  const MixOutput<float>& out = p.out[o];
  int64_t head = b * p.heads + h;
  const float* from = out.x.head<float>(b, h) + token * out.x.stride_n;
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < p.dim; ++i) sum += from[i] * element_of_map(p, o, head, i, c);
  if (add) sum += element_of_scale(p, o, head, c) * out.add.head<float>(b, h)[token * out.add.stride_n + c];
  out.to.token(b, h, token)[c] = sum;
}

// A block processes one chunk of the tokens of one (batch, head).
template <class T, int kDim, int kOutputs, int kAdds>
__global__ void __launch_bounds__(FragmentMix<T, kDim, kOutputs, kAdds>::kThreads,
                                  FragmentMix<T, kDim, kOutputs, kAdds>::kBlocks)
    fragment_mix_kernel(const __grid_constant__ MixArgs<T> p) {
  using Sizes = FragmentMix<T, kDim, kOutputs, kAdds>;
  using X = typename Sizes::X;
  using Y = typename Sizes::Y;
  constexpr int kThreads = Sizes::kThreads, kSteps = Sizes::kSteps, kTiles = Sizes::kTiles, kGroups = Sizes::kGroups;
  Lane lane;
  int64_t block = blockIdx.x;
  int64_t h = block % p.heads;
  block /= p.heads;
  int64_t part = block % p.parts, b = block / p.parts, begin = part * p.chunk;
  int tokens = (int)(p.tokens - begin < p.chunk ? p.tokens - begin : p.chunk), dim = p.dim;
  int64_t head = b * p.heads + h;

  XK_ARENA(arena);
  FragmentMixLayout<T, kDim, kOutputs, kAdds> s(arena);
  if constexpr (kScaled<T>) {
#pragma unroll 1
    for (int o = 0; o < kOutputs; ++o)
      scale_columns<kDim, kThreads>(s.up + o * kDim, s.down + o * kDim, [&](int c) {
        float largest = 0;
        for (int i = 0; i < dim && c < dim; ++i) largest = fmaxf(largest, fabsf(element_of_map(p, o, head, i, c)));
        return largest;
      });
    __syncthreads();  // all scales are written
  }
#pragma unroll 1
  for (int at = (int)threadIdx.x; at < kOutputs * kTiles * kSteps * 32; at += kThreads) {
    // the fragment of lane (g, t): rows of a tile are features of y, columns of a step are features of x
    int g = at % 32 / 4, t = at % 4, rest = at / 32, step = rest % kSteps, tile = rest / kSteps % kTiles;
    int o = rest / kSteps / kTiles;
    auto get = [&](int number, int row) {
      int in = X::feature(t, number), to = Y::feature(g, 2 * tile + row);
      float value = in < dim && to < dim ? element_of_map(p, o, head, in, to) : 0.f;
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

  // kAdds may be 0, the size of an array not
  const char *from[kOutputs], *add_from[kAdds + 1];
  char* to[kOutputs];
  int step_x[kOutputs], step_add[kAdds + 1], step_y[kOutputs];  // token strides in bytes
  float scale[kAdds + 1][Y::kNumbers] = {}, down[kOutputs][Y::kNumbers] = {};
  auto first_token = [&](const Operand& x, int feature) {
    return reinterpret_cast<const char*>(x.head<T>(b, h) + begin * x.stride_n + feature);
  };
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const MixOutput<T>& out = p.out[o];
    from[o] = first_token(out.x, X::feature(lane.t, 0));
    step_x[o] = (int)(out.x.stride_n * (int64_t)sizeof(T));
    to[o] = reinterpret_cast<char*>(out.to.token(b, h, begin) + Y::feature(lane.g, 0));
    step_y[o] = (int)(out.to.stride_n * (int64_t)sizeof(T));
    if (o < kAdds) {
      add_from[o] = first_token(out.add, Y::feature(lane.g, 0));
      step_add[o] = (int)(out.add.stride_n * (int64_t)sizeof(T));
    }
#pragma unroll
    for (int i = 0; i < Y::kNumbers; ++i) {
      int c = Y::feature(lane.g, i);
      if constexpr (kScaled<T>) down[o][i] = s.down[o * kDim + c];
      if (o < kAdds && c < dim) scale[o][i] = element_of_scale(p, o, head, c);
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
      uint32_t high[kGroups][X::kWords], low[kGroups][X::kWords];
#pragma unroll
      for (int r = 0; r < kGroups; ++r)
#pragma unroll
        for (int i = 0; i < X::kWords; ++i) {
          high[r][i] = now[o][r][i];
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
      bool add = o < kAdds;
#pragma unroll
      for (int r = 0; r < kGroups; ++r)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          int n = token + 8 * r + 2 * lane.t + u;
          bool inside = n < tokens;
          alignas(16) uint32_t words[Y::kWords] = {};
          if (add) Y::load(words, add_from[o] + (int64_t)n * step_add[o], lane.g, dim, inside);
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
          if (n < tokens && c < dim && !isfinite(p.out[o].to.token(b, h, begin + n)[c]))
            mix_again(p, o, b, h, begin + n, c, o < kAdds);
        }
}

constexpr int kClearThreads = 256;

// Writes zeros to the tokens of all results where the mask is False. A warp has all heads of one (batch, token) at a
// time.
template <class T>
__global__ void __launch_bounds__(kClearThreads) clear_kernel(const __grid_constant__ MixArgs<T> p) {
  int64_t warp = ((int64_t)blockIdx.x * kClearThreads + threadIdx.x) / 32,
          warps = (int64_t)gridDim.x * kClearThreads / 32;
  for (; warp < p.batch * p.tokens; warp += warps) {
    int64_t b = warp / p.tokens, n = warp % p.tokens;
    if (p.mask.keeps(b, n)) continue;
    for (int64_t i = (int)threadIdx.x % 32; i < p.heads * p.dim; i += 32)
      for (int o = 0; o < p.outputs; ++o) p.out[o].to.token(b, i / p.dim, n)[i % p.dim] = narrow<T>(0);
  }
}

}  // namespace xk::cuda
