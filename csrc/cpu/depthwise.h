// A depthwise convolution of images in channels_last memory, fused with batch norm and hard-swish:
//
//     y[b,i,j,c] = act(batch_norm(sum_uv w[c,u,v] x[b, s i + u - k/2, s j + v - k/2, c]))
//
// with zeros outside the image.
//
// A unit of work is one vector of channels of some rows of one output image. Its k x k weights, with batch norm folded
// in, are packed first and stay in L1. Within a row, `kTogether` outputs are computed at a time: for each row of the
// kernel, a pixel of x is read once for all outputs that use it.
#pragma once

#include "norm.h"

namespace xk {
namespace XK_LEVEL {
namespace {

constexpr int64_t kDepthwiseWork = 100'000;          // minimum multiply-adds per thread: about 5 us
constexpr int kTogether = kRegisters >= 32 ? 8 : 4;  // outputs computed at a time, with one accumulator each

template <int K, int S>
struct Depthwise {
  const xk_depthwise_args& p;
  const int64_t height, width;  // of the output

  explicit Depthwise(const xk_depthwise_args& p) : p(p), height(divide_up(p.height, S)), width(divide_up(p.width, S)) {}

  struct Kernel {
    alignas(64) float w[K * K][VL<float>];
    alignas(64) float shift[VL<float>];
  };

  // `lanes` channels starting at c; the other lanes are zeros
  void pack(int64_t c, int lanes, Kernel& kernel) const {
    auto part = [&](const float* v) { return v ? v + c : nullptr; };
    const xk_batch_norm norm = {part(p.norm.mean), part(p.norm.variance), part(p.norm.weight), part(p.norm.bias),
                                p.norm.eps};
    alignas(64) float scale[VL<float>];
    scale_and_shift(norm, part(p.bias), lanes, scale, kernel.shift);
    for (int l = 0; l < VL<float>; ++l)
      for (int t = 0; t < K * K; ++t) kernel.w[t][l] = l < lanes ? p.weight[(c + l) * K * K + t] * scale[l] : 0;
  }

  // N outputs of row i, starting at column j. Inside: all columns of x that they use are inside the image. Whole: all
  // lanes are used.
  template <int N, bool Inside, bool Whole>
  void outputs(const Kernel& kernel, const float* x, float* y, int64_t i, int64_t j, int lanes) const {
    const int64_t top = S * i - K / 2, left = S * j - K / 2;
    const int u0 = int(most(0, -top)), u1 = int(least(K, p.height - top));
    V<float> acc[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[n] = load(kernel.shift);
    for (int u = u0; u < u1; ++u) {
      const float* row = x + ((top + u) * p.width + left) * p.channels;
      V<float> w[K];
#pragma GCC unroll 8
      for (int v = 0; v < K; ++v) w[v] = load(kernel.w[u * K + v]);
#pragma GCC unroll 24
      for (int q = 0; q < S * (N - 1) + K; ++q) {
        if (!Inside && (left + q < 0 || left + q >= p.width)) continue;
        const float* from = row + q * p.channels;
        V<float> pixel = Whole ? load(from) : load(from, lanes);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
          if (q - S * n >= 0 && q - S * n < K) acc[n] += pixel * w[q - S * n];
      }
    }
    float* to = y + (i * width + j) * p.channels;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n, to += p.channels) {
      V<float> value = p.hard_swish ? hard_swish<float>(acc[n]) : acc[n];
      if (Whole)
        store(to, value);
      else
        store(to, value, lanes);
    }
  }

  template <bool Whole>
  void row(const Kernel& kernel, const float* x, float* y, int64_t i, int lanes) const {
    auto inside = [&](int64_t j, int n) { return S * j >= K / 2 && S * (j + n - 1) + K - K / 2 <= p.width; };
    for (int64_t j = 0; j < width;) {
      if (inside(j, kTogether)) {
        outputs<kTogether, true, Whole>(kernel, x, y, i, j, lanes);
        j += kTogether;
      } else if (inside(j, 2)) {
        outputs<2, true, Whole>(kernel, x, y, i, j, lanes);
        j += 2;
      } else {
        outputs<1, false, Whole>(kernel, x, y, i, j, lanes);
        j += 1;
      }
    }
  }

  // The work is split over rows, all channels each, because adjacent vectors of a pixel may be in one cache line. For
  // small feature maps, where packing the weights would take each thread as long as using them, it is split over
  // channels.
  int run() const {
    const int64_t vectors = divide_up(p.channels, VL<float>), pixels = height * width;
    const int64_t work = p.batch * pixels * p.channels * K * K;
    const int threads = int(most(least(p.threads, work / kDepthwiseWork), 1));
    const int64_t wanted = p.batch == 1 ? threads : divide_up(4 * threads, most(p.batch, 1));
    const bool by_rows = pixels >= 64 * wanted;
    const int64_t rows = divide_up(height, by_rows ? least(wanted, height) : 1), parts = divide_up(height, rows);
    const int64_t group = divide_up(vectors, by_rows ? 1 : least(wanted, vectors)), groups = divide_up(vectors, group);
    parallel_for(p.batch * parts * groups, threads, [&](int64_t unit, int) {
      const int64_t g = unit % groups, part = unit / groups % parts, b = unit / groups / parts;
      for (int64_t v = g * group; v < least((g + 1) * group, vectors); ++v) {
        const int64_t c = v * VL<float>;
        const int lanes = int(least(VL<float>, p.channels - c));
        Kernel kernel;
        pack(c, lanes, kernel);
        const float* x = p.x + b * p.height * p.width * p.channels + c;
        float* y = p.y + b * pixels * p.channels + c;
        for (int64_t i = part * rows; i < least((part + 1) * rows, height); ++i)
          if (lanes == VL<float>)
            row<true>(kernel, x, y, i, lanes);
          else
            row<false>(kernel, x, y, i, lanes);
      }
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
