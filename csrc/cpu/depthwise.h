// A depthwise convolution of images in channels_last memory, fused with batch norm and hard-swish:
//
//     y[b,i,j,c] = act(batch_norm(sum_uv w[c,u,v] x[b, s i + u - k/2, s j + v - k/2, c]))
//
// with zeros outside the image.
//
// A unit of work is one cache line of channels of some rows of one output image: with less, each line would be read
// several times. Its k x k weights, with batch norm folded in, are packed first and stay in L1. Within a row,
// `kTogether` outputs are computed at a time: for each row of the kernel, a pixel of x is read once for all outputs
// that use it.
#pragma once

#include "norm.h"

namespace xk {
namespace XK_LEVEL {
namespace {

constexpr int64_t kDepthwiseWork = 100'000;  // minimum multiply-adds per thread: about 5 us
constexpr int kLine = 64 / kVectorBytes;     // vectors in a cache line
// Outputs computed at a time, with one accumulator per vector: half of the registers, but no more than hide the
// latency.
constexpr int kTogether = least_of(kRegisters / 2 / kLine, 8);

template <int K, int S>
struct Depthwise {
  const xk_depthwise_args& p;
  const int64_t height, width;  // of the output

  explicit Depthwise(const xk_depthwise_args& p) : p(p), height(divide_up(p.height, S)), width(divide_up(p.width, S)) {}

  // The weights of M vectors of channels.
  template <int M>
  struct Kernel {
    alignas(64) float w[K * K][M * VL<float>];
    alignas(64) float shift[M * VL<float>];
  };

  // `lanes` channels starting at c; the other lanes are zeros
  template <int M>
  void pack(int64_t c, int lanes, Kernel<M>& kernel) const {
    auto part = [&](const float* v) { return v ? v + c : nullptr; };
    const xk_batch_norm norm = {part(p.norm.mean), part(p.norm.variance), part(p.norm.weight), part(p.norm.bias),
                                p.norm.eps};
    alignas(64) float scale[M * VL<float>];
    scale_and_shift(norm, part(p.bias), lanes, scale, kernel.shift);
    for (int l = 0; l < M * VL<float>; ++l)
      for (int t = 0; t < K * K; ++t) kernel.w[t][l] = l < lanes ? p.weight[(c + l) * K * K + t] * scale[l] : 0;
  }

  // N outputs of row i, starting at column j, M vectors each. Inside: all columns of x that they use are inside the
  // image. Whole: all lanes are used; otherwise M is 1.
  template <int N, int M, bool Inside, bool Whole>
  void outputs(const Kernel<M>& kernel, const float* x, float* y, int64_t i, int64_t j, int lanes) const {
    const int64_t top = S * i - K / 2, left = S * j - K / 2;
    const int u0 = int(most(0, -top)), u1 = int(least(K, p.height - top));
    V<float> acc[N][M];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int c = 0; c < M; ++c) acc[n][c] = load(kernel.shift + c * VL<float>);
    for (int u = u0; u < u1; ++u) {
      const float* row = x + ((top + u) * p.width + left) * p.channels;
      const auto& w = kernel.w;
#pragma GCC unroll 24
      for (int q = 0; q < S * (N - 1) + K; ++q) {
        if (!Inside && (left + q < 0 || left + q >= p.width)) continue;
#pragma GCC unroll 4
        for (int c = 0; c < M; ++c) {
          const float* from = row + q * p.channels + c * VL<float>;
          const V<float> pixel = Whole ? load(from) : load(from, lanes);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n)
            if (q - S * n >= 0 && q - S * n < K) acc[n][c] += pixel * load(w[u * K + q - S * n] + c * VL<float>);
        }
      }
    }
    if (S == 1 && Inside) {  // with stride 2, four times as many lines per output: more than it saves
      const float* next_row = x + ((top + K) * p.width + j) * p.channels;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) __builtin_prefetch(next_row + n * p.channels);
    }
    float* to = y + (i * width + j) * p.channels;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n, to += p.channels)
#pragma GCC unroll 4
      for (int c = 0; c < M; ++c) {
        const V<float> value = p.hard_swish ? hard_swish<float>(acc[n][c]) : acc[n][c];
        if (Whole)
          store(to + c * VL<float>, value);
        else
          store(to, value, lanes);
      }
  }

  // M vectors of the channels starting at c, of rows [first, end) of an image
  template <int M, bool Whole>
  void rows(int64_t b, int64_t first, int64_t end, int64_t c, int lanes) const {
    Kernel<M> kernel;
    pack(c, lanes, kernel);
    const float* x = p.x + b * p.height * p.width * p.channels + c;
    float* y = p.y + b * height * width * p.channels + c;
    auto inside = [&](int64_t j, int n) { return S * j >= K / 2 && S * (j + n - 1) + K - K / 2 <= p.width; };
    for (int64_t i = first; i < end; ++i)
      for (int64_t j = 0; j < width;) {
        if (inside(j, kTogether)) {
          outputs<kTogether, M, true, Whole>(kernel, x, y, i, j, lanes);
          j += kTogether;
        } else if (inside(j, 2)) {
          outputs<2, M, true, Whole>(kernel, x, y, i, j, lanes);
          j += 2;
        } else {
          outputs<1, M, false, Whole>(kernel, x, y, i, j, lanes);
          j += 1;
        }
      }
  }

  // The work is split over rows, all channels each. For small feature maps, where packing the weights would take each
  // thread as long as using them, it is split over channels.
  int run() const {
    const int64_t lines = divide_up(p.channels, kLine * VL<float>), pixels = height * width;
    const int64_t work = p.batch * pixels * p.channels * K * K;
    const int threads = int(most(least(p.threads, work / kDepthwiseWork), 1));
    const int64_t wanted = p.batch == 1 ? threads : divide_up(4 * threads, most(p.batch, 1));
    const bool by_rows = pixels >= 64 * wanted;
    const int64_t of_part = divide_up(height, by_rows ? least(wanted, height) : 1), parts = divide_up(height, of_part);
    const int64_t group = divide_up(lines, by_rows ? 1 : least(wanted, lines)), groups = divide_up(lines, group);
    parallel_for(p.batch * parts * groups, threads, [&](int64_t unit, int) {
      const int64_t g = unit % groups, part = unit / groups % parts, b = unit / groups / parts;
      const int64_t first = part * of_part, end = least(first + of_part, height);
      const int64_t channels = least((g + 1) * group * kLine * VL<float>, p.channels);
      int64_t c = g * group * kLine * VL<float>;
      for (; c + kLine * VL<float> <= channels; c += kLine * VL<float>)
        rows<kLine, true>(b, first, end, c, kLine * VL<float>);
      for (; c + VL<float> <= channels; c += VL<float>) rows<1, true>(b, first, end, c, VL<float>);
      if (c < channels) rows<1, false>(b, first, end, c, int(channels - c));
    });
    return XK_OK;
  }
};

int depthwise(const xk_depthwise_args& p) {
  if (p.kernel == 3 && p.stride == 1) return Depthwise<3, 1>(p).run();
  if (p.kernel == 3 && p.stride == 2) return Depthwise<3, 2>(p).run();
  if (p.kernel == 5 && p.stride == 1) return Depthwise<5, 1>(p).run();
  if (p.kernel == 5 && p.stride == 2) return Depthwise<5, 2>(p).run();
  return XK_BAD_ARGUMENT;
}

}  // namespace
}  // namespace XK_LEVEL
}  // namespace xk
