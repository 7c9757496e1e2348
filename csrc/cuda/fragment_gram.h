// The first pass, with tokens loaded directly as mma.sync operands: see fragments.h. Never run on a GPU.
//
// A warp processes 16 tokens per step (8 for fp32). Each lane loads a quarter of these tokens, selected by t, and the
// features selected by g. The fragments of a (rows of G) and b (columns of G) are multiplied, and G is accumulated over
// the tokens. fp32 uses 3xTF32, smallest products first. Since tensor cores truncate their sums, the accumulators of
// fp32 are added to fp32 totals in shared memory every 4 steps.
#pragma once

#include "fragments.h"
#include "tokens.h"

namespace xk::cuda {

struct GramArgs {
  Operand a, b;  // with the same number of features
  Mask mask;
  int64_t batch, heads, tokens, parts, chunk;
  float* partial;  // (parts, batch, heads, step): G, then if `squares` the sums of squares of a and of b
  int64_t step;
  int32_t squares;
};

// G for at most kDim features of a and of b.
template <class T, int kDim>
struct FragmentGram {
  static constexpr bool kTf32 = sizeof(T) == 4;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = kDim > 32 ? 2 : kDim > 16 ? kTf32 ? 4 : 3 : 5;  // per SM, limited by registers
  static constexpr int kShare = kDim > 48 ? 2 : 1;        // warps per slice: each has a part of a's features
  static constexpr int kSlices = kThreads / 32 / kShare;  // groups of kShare warps: each processes different tokens
  static constexpr int kTokens = kTf32 ? 8 : 16, kEach = kTokens / 4;
  static constexpr int kSteps = kTf32 ? 4 : 2;  // steps of a warp between flushes, in the main loop
  static constexpr int kTilesB = kDim / 8, kTilesA = kTilesB / kShare, kDown = kTilesA / 2;
  using A = Pieces<T, kDim / kShare, 8>;
  using B = Pieces<T, kDim, 8>;
  static constexpr int kKept = kTf32 ? kDown * kTilesB * 4 : 0;  // totals of a thread in shared memory
};

template <class T, int kDim>
struct FragmentGramLayout {
  Shared<float> kept;        // totals of all threads: see FragmentSums
  Shared<float> g;           // (kDim, kDim): sum over all warps
  Shared<float> of_a, of_b;  // sums of squares over all warps

  __host__ __device__ explicit FragmentGramLayout(Arena& arena) {
    kept = arena.take<float>(FragmentGram<T, kDim>::kKept * FragmentGram<T, kDim>::kThreads);
    g = arena.take<float>(kDim * kDim);
    of_a = arena.take<float>(kDim);
    of_b = arena.take<float>(kDim);
  }
};

template <class T, int kDim>
class FragmentSums {
  using Sizes = FragmentGram<T, kDim>;
  using A = typename Sizes::A;
  using B = typename Sizes::B;
  static constexpr int kTilesA = Sizes::kTilesA, kTilesB = Sizes::kTilesB, kDown = Sizes::kDown, kEach = Sizes::kEach;

 public:
  __device__ __forceinline__ void add(const uint32_t (&a)[kEach][A::kWords], const uint32_t (&b)[kEach][B::kWords],
                                      bool squares, int share) {
    if constexpr (Sizes::kTf32)
      add_float(a, b, squares);
    else
      add_short(a, b, squares, share);
  }

  // `kept`: kKept numbers per thread, interleaved over the threads of the block in groups of 4.
  __device__ __forceinline__ explicit FragmentSums(Shared<float> kept) : total_(kept + 4 * (int)threadIdx.x) {
    if constexpr (Sizes::kTf32) {
      const float zeros[4] = {};
#pragma unroll
      for (int i = 0; i < Sizes::kKept; i += 4) load_numbers<4>(&total_[i * Sizes::kThreads], zeros);
    }
  }

  // fp32 only, every kSteps steps and at the end: adds the accumulators to the totals and clears them. The totals are
  // in shared memory to save registers.
  __device__ __forceinline__ void flush() {
    if constexpr (Sizes::kTf32)
      totals([&](float* total, float (&now)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e) total[e] += now[e], now[e] = 0;
      });
  }

  // Calls g(row, column, sum), of_a(row, sum) and of_b(column, sum) for the final sums of this lane. For fp32, each
  // lane holds sums of squares over its own tokens only; they are added over t by shuffles, so all lanes must take
  // part.
  template <class OfG, class OfA, class OfB>
  __device__ void store(const Lane& lane, int share, bool squares, OfG g, OfA of_a, OfB of_b) {
    int first = share * (kDim / Sizes::kShare);
    if constexpr (Sizes::kTf32) totals([](const float* total, float (&now)[4]) { load_numbers<4>(now, total); });
#pragma unroll
    for (int m = 0; m < kDown; ++m)
#pragma unroll
      for (int j = 0; j < kTilesB; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          g(first + A::feature(lane.g, 2 * m + e / 2), B::feature(2 * lane.t + e % 2, j), now_[m][j][e]);
    if (!squares) return;
    if constexpr (Sizes::kTf32) {
      auto over_t = [](float x) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
          float other = __shfl_xor_sync(0xffffffffu, x, step);
          XK_STEP(shuffle, x += other);
        }
        return x;
      };
#pragma unroll
      for (int i = 0; i < kTilesA; ++i) {
        float x = over_t(square_a_[i]);
        if (lane.t == 0) of_a(first + A::feature(lane.g, i), x);
      }
#pragma unroll
      for (int i = 0; i < kTilesB; ++i) {
        float x = over_t(square_b_[i]);
        if (lane.t == 0 && share == 0) of_b(B::feature(lane.g, i), x);
      }
    } else if (lane.g / 2 == lane.t) {  // lanes that hold diagonal elements
      bool odd = lane.g % 2;
#pragma unroll
      for (int i = 0; i < kTilesA; ++i) {
        of_a(first + A::feature(lane.g, i), odd ? square_a_[i][i % 2 * 2 + 1] : square_a_[i][i % 2 * 2]);
        int j = share * kTilesA + i;
        of_b(B::feature(lane.g, j), odd ? square_b_[i][i % 2 * 2 + 1] : square_b_[i][i % 2 * 2]);
      }
    }
  }

 private:
  alignas(16) float now_[kDown][kTilesB][4] = {};
  Shared<float> total_;
  // Sums of squares. fp32: by scalar multiply-adds, over the lane's tokens. Otherwise: accumulators of the product of a
  // tile with itself, of which only the diagonal is used.
  using Square = std::conditional_t<Sizes::kTf32, float, float[4]>;
  Square square_a_[kTilesA] = {};
  Square square_b_[Sizes::kTf32 ? kTilesB : kTilesA] = {};

  template <class F>
  __device__ __forceinline__ void totals(F f) {
#pragma unroll
    for (int m = 0; m < kDown; ++m)
#pragma unroll
      for (int j = 0; j < kTilesB; ++j) {
        Shared<float> at = total_ + (m * kTilesB + j) * 4 * Sizes::kThreads;
        alignas(16) float total[4];
        load_numbers<4>(total, &at[0]);
        f(total, now_[m][j]);
        load_numbers<4>(&at[0], total);
      }
  }

  // From registers with two features of one token to registers with two tokens of one feature.
  template <int kWords>
  __device__ static __forceinline__ void transpose(const uint32_t (&x)[kEach][kWords], uint32_t (&to)[2 * kWords][2]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w)
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        to[2 * w][u] = __byte_perm(x[2 * u][w], x[2 * u + 1][w], 0x5410);
        to[2 * w + 1][u] = __byte_perm(x[2 * u][w], x[2 * u + 1][w], 0x7632);
      }
  }

  __device__ __forceinline__ void add_short(const uint32_t (&a)[kEach][A::kWords],
                                            const uint32_t (&b)[kEach][B::kWords], bool squares, int share) {
    if constexpr (!Sizes::kTf32) {
      uint32_t ka[kTilesA][2], kb[kTilesB][2];
      transpose(a, ka);
      transpose(b, kb);
#pragma unroll
      for (int m = 0; m < kDown; ++m) {
        uint32_t rows[4] = {ka[2 * m][0], ka[2 * m + 1][0], ka[2 * m][1], ka[2 * m + 1][1]};
#pragma unroll
        for (int j = 0; j < kTilesB; ++j) mma<T>(now_[m][j], rows, kb[j][0], kb[j][1]);
        if (squares) {
          auto own = [&](int i, int u) {  // each warp of a slice takes a part of b's features
            return Sizes::kShare == 1 || share == 0 ? kb[i][u] : kb[kTilesB - kTilesA + i][u];
          };
          uint32_t of_b[4] = {own(2 * m, 0), own(2 * m + 1, 0), own(2 * m, 1), own(2 * m + 1, 1)};
          mma<T>(square_a_[2 * m], rows, rows[0], rows[2]);
          mma<T>(square_a_[2 * m + 1], rows, rows[1], rows[3]);
          mma<T>(square_b_[2 * m], of_b, of_b[0], of_b[2]);
          mma<T>(square_b_[2 * m + 1], of_b, of_b[1], of_b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void add_float(const uint32_t (&a)[kEach][A::kWords],
                                            const uint32_t (&b)[kEach][B::kWords], bool squares) {
    if constexpr (Sizes::kTf32) {
      uint32_t bh[kTilesB][2], bl[kTilesB][2];
#pragma unroll
      for (int i = 0; i < kTilesB; ++i)
#pragma unroll
        for (int u = 0; u < 2; ++u) split_into_tf32(b[u][i], bh[i][u], bl[i][u]);
      if (squares) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
#pragma unroll
          for (int i = 0; i < kTilesA; ++i) square_a_[i] += __uint_as_float(a[u][i]) * __uint_as_float(a[u][i]);
#pragma unroll
          for (int i = 0; i < kTilesB; ++i) square_b_[i] += __uint_as_float(b[u][i]) * __uint_as_float(b[u][i]);
        }
      }
#pragma unroll
      for (int m = 0; m < kDown; ++m) {
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) split_into_tf32(a[i / 2][2 * m + i % 2], high[i], low[i]);
#pragma unroll
        for (int j = 0; j < kTilesB; ++j) mma<T>(now_[m][j], low, bh[j][0], bh[j][1]);
#pragma unroll
        for (int j = 0; j < kTilesB; ++j) mma<T>(now_[m][j], high, bl[j][0], bl[j][1]);
#pragma unroll
        for (int j = 0; j < kTilesB; ++j) mma<T>(now_[m][j], high, bh[j][0], bh[j][1]);
      }
    }
  }
};

// One element of G for fp32, computed without tensor cores.
__device__ inline float sum_of_products(const GramArgs& p, int64_t b, int64_t h, int64_t begin, int tokens, int row,
                                        int column) {
  const float* x = p.a.head<float>(b, h) + begin * p.a.stride_n + row;
  const float* y = p.b.head<float>(b, h) + begin * p.b.stride_n + column;
  float sum = 0;
#pragma unroll 1
  for (int n = 0; n < tokens && sum == sum; ++n)
    if (p.mask.keeps(b, begin + n)) sum += x[n * p.a.stride_n] * y[n * p.b.stride_n];
  return sum;
}

// A block processes one chunk of the tokens of one (batch, head).
template <class T, int kDim>
__global__ void __launch_bounds__(FragmentGram<T, kDim>::kThreads, FragmentGram<T, kDim>::kBlocks)
    fragment_gram_kernel(const __grid_constant__ GramArgs p) {
  using Sizes = FragmentGram<T, kDim>;
  using A = typename Sizes::A;
  using B = typename Sizes::B;
  constexpr int kTokens = Sizes::kTokens, kEach = Sizes::kEach, kSlices = Sizes::kSlices, kSteps = Sizes::kSteps;
  Lane lane;
  int share = lane.warp % Sizes::kShare, slice = lane.warp / Sizes::kShare;
  int64_t block = blockIdx.x;
  int64_t h = block % p.heads;
  block /= p.heads;
  int64_t part = block % p.parts, b = block / p.parts, begin = part * p.chunk;
  int tokens = (int)(p.tokens - begin < p.chunk ? p.tokens - begin : p.chunk), dim = p.a.features;
  bool squares = p.squares;

  auto first_token = [&](const Operand& x, int feature) {
    return reinterpret_cast<const char*>(x.head<T>(b, h) + begin * x.stride_n + feature);
  };
  constexpr int kPart = kDim / Sizes::kShare;
  const char* base_a = first_token(p.a, share * kPart + A::feature(lane.g, 0));
  const char* base_b = first_token(p.b, B::feature(lane.g, 0));
  int step_a = (int)(p.a.stride_n * (int64_t)sizeof(T)), step_b = (int)(p.b.stride_n * (int64_t)sizeof(T));
  int dim_a = dim - share * kPart;

  // This warp processes every kSlices-th step, starting at `slice`. Double buffering: the tokens of the next step are
  // loaded while the current ones are multiplied.
  constexpr int kStride = kSlices * kTokens;
  int whole = tokens / kTokens > slice ? (tokens / kTokens - slice + kSlices - 1) / kSlices : 0;
  int token = slice * kTokens + kEach * lane.t;  // first token of this lane
  uint32_t a[2][kEach][A::kWords] = {}, x[2][kEach][B::kWords] = {};
  auto fetch = [&](int buffer, int token, auto there) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      A::load(a[buffer][i], base_a + (int64_t)(token + i) * step_a, lane.g, dim_a, there(token + i));
      B::load(x[buffer][i], base_b + (int64_t)(token + i) * step_b, lane.g, dim, there(token + i));
    }
  };
  auto fetch_all = [&](int buffer) { fetch(buffer, token, [](int) { return true; }); };

  XK_ARENA(arena);
  FragmentGramLayout<T, kDim> s(arena);
  FragmentSums<T, kDim> sums(s.kept);
  int runs = p.mask.data ? 0 : whole / kSteps;
  if (runs) fetch_all(0);
#pragma unroll 1
  for (int left = runs * kSteps; left > 0; left -= 2) {
    token += kStride;
    fetch_all(1);
    sums.add(a[0], x[0], squares, share);
    if (left > 2) token += kStride;  // the last iteration reloads the same tokens, which are not used
    fetch_all(0);
    sums.add(a[1], x[1], squares, share);
    if (left % kSteps == 2) sums.flush();
  }
  // Remainder: fewer than kSteps full steps, and possibly a partial one; all steps if there is a mask.
  token = slice * kTokens + runs * kSteps * kStride;
#pragma unroll 1
  for (int step = 1; token < tokens; token += kStride, ++step) {
    XK_STEP(tail_mask, (clear_words(a[0]), clear_words(x[0])));
    fetch(0, token + kEach * lane.t, [&](int token) { return token < tokens && p.mask.keeps(b, begin + token); });
    sums.add(a[0], x[0], squares, share);
    if (step % kSteps == 0) sums.flush();
  }
  sums.flush();

  // Adds the sums of all warps in a fixed order.
#pragma unroll 1
  for (int turn = 0; turn < kSlices; ++turn) {
    if (slice == turn) {
      auto add = [&](Shared<float> to, int at, float value) { to[at] = turn == 0 ? value : to[at] + value; };
      sums.store(
          lane, share, squares, [&](int row, int column, float value) { add(s.g, row * kDim + column, value); },
          [&](int row, float value) { add(s.of_a, row, value); },
          [&](int column, float value) { add(s.of_b, column, value); });
    }
    XK_STEP(barrier, __syncthreads());  // the next slice adds to these sums; after the last one, all threads read them
  }
  float* to = p.partial + ((part * p.batch + b) * p.heads + h) * p.step;
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < dim * dim; i += Sizes::kThreads) {
    int row = i / dim, column = i % dim;
    float sum = s.g[row * kDim + column];
    if constexpr (Sizes::kTf32)  // the low part of an infinite input is NaN
      if (!isfinite(sum)) sum = sum_of_products(p, b, h, begin, tokens, row, column);
    to[i] = sum;
  }
  if (squares)
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < dim; i += Sizes::kThreads) {
      to[dim * dim + i] = s.of_a[i];
      to[dim * dim + dim + i] = s.of_b[i];
    }
}

}  // namespace xk::cuda
