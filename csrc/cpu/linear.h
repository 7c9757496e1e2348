// A linear layer on float32 rows, fused with the norms and the activation around it:
//
//     y = act(batch_norm(layer_norm(x) w^T + bias)) + add
//
// W, with batch norm folded in, is packed once per call, or in advance by pack_linear, as panels of output features
// (mix_block in tile.h), padded to whole vectors; rows of a panel are input features. Each block of tokens is
// layer-normalised into scratch rows, if there is a layer norm, and multiplied by the register tiles of tile.h.
#pragma once

#include "norm.h"

namespace xk {
namespace XK_LEVEL {
namespace {

constexpr int64_t kLinearWork = 600'000;  // minimum multiply-adds per thread: about 5 us
constexpr int kChain = 512;           // products summed sequentially: with more, the error would exceed that of torch
constexpr int64_t kLinearBlock = 96;  // maximum tokens of a block, so that it stays in L2
constexpr int kSmallWeight = 8192;    // elements of a weight that stays in L1

class Linear {
 public:
  explicit Linear(const xk_linear_args& p)
      : p(p),
        in(int(p.dim_in)),
        out(int(p.dim_out)),
        ld(padded<float>(out)),
        ld_in(padded<float>(in)),
        panels(ld / VL<float>, kMaxNR),
        threads(int(most(least(p.threads, p.tokens * in * out / kLinearWork), 1))),
        // threads have equal numbers of tokens, in blocks of equal size
        block(divide_up(divide_up(p.tokens, threads), divide_up(divide_up(p.tokens, threads), kLinearBlock))),
        rows_size(p.layer_norm ? (block + 1) * ld_in + block : 0),
        w((size_t)((p.packed ? 0 : in) + 2) * ld),
        rows(threads * rows_size),
        shift(w.data),
        scale(shift + ld),
        own(scale + ld) {}

  int run() {
    if (!w.data || !rows.data) return XK_OUT_OF_MEMORY;
    scale_and_shift(p.norm, p.bias, out, scale, shift);
    if (threads > 1 && out >= p.tokens && panels.parts >= threads)
      by_panels();
    else
      by_tokens();
    return XK_OK;
  }

 private:
  const xk_linear_args& p;
  const int in, out, ld, ld_in;
  const Cut panels;
  const int threads;
  const int64_t block, rows_size;
  Buffer<float> w, rows;
  float *const shift, *const scale, *const own;  // own: W as packed by this call

  // Threads pack panels of W, wait at a barrier, and then process blocks of tokens.
  void by_tokens() {
    const int64_t blocks = divide_up(p.tokens, block);
    together(threads, [&](int thread, int count, auto wait) {
      auto share = [&](int64_t total, int which) { return total * which / count; };
      if (!p.packed) {
        pack(int(share(panels.parts, thread)), int(share(panels.parts, thread + 1)));
        wait();  // each thread reads all of W
      }
      for (int64_t b = share(blocks, thread); b < share(blocks, thread + 1); ++b)
        mix(b * block, 0, panels.parts, rows.data + thread * rows_size);
    });
  }

  // For few tokens and a large W: each thread packs some panels of W and uses them for all tokens.
  void by_panels() {
    parallel_for(threads, threads, [&](int64_t part, int thread) {
      const int first = int(panels.parts * part / threads), end = int(panels.parts * (part + 1) / threads);
      if (!p.packed) pack(first, end);
      for (int64_t n = 0; n < p.tokens; n += block) mix(n, first, end, rows.data + thread * rows_size);
    });
  }

  void pack(int first, int end) {
    for (int i = first; i < end; ++i) {
      pack_panel(p.weight, in, 1, in, out, panels, i, own);
      if (!p.norm.variance) continue;
      const int column = panels.start(i) * VL<float>, wide = panels.size(i) * VL<float>;
      float* w = own + (size_t)column * in;
      for (int k = 0; k < in; ++k, w += wide)
        for (int c = 0; c < wide; c += VL<float>) store(w + c, load(w + c) * load(scale + column + c));
    }
  }

  // Panels [first, end) of the output of a block of tokens.
  void mix(int64_t n, int first, int end, float* normed) const {
    const int tokens = int(least(block, p.tokens - n));
    Ahead soon[2];
    MixTile<float> t{};
    t.ahead = soon;
    t.x = p.x + n * in;
    t.x_row = in;
    if (p.layer_norm) {
      pack_rows<float, false>(t.x, in, tokens, in, normed, ld_in, normed);
      layer_norm_rows(normed, normed + (block + 1) * ld_in, tokens, in, ld_in, float(p.layer_norm_eps));
      affine_rows(normed, p.layer_norm_weight, p.layer_norm_bias, tokens, in, ld_in);
      t.x = normed;
      t.x_row = ld_in;
    }
    t.x_k = 1;
    t.w = p.packed ? p.packed : own;
    t.panel_rows = in;
    t.y = p.y + n * out;
    t.ldy = out;
    t.dtype = XK_F32;
    for (int k = 0; k < in; k += kChain) {
      t.K = int(least(kChain, in - k));
      t.panel_row = k;
      soon[0] = next_panels(t.w, first, end, k, t.K, tokens);
      soon[1] = next_tokens(n + tokens, first, end, k, t.K, tokens);
      if (k + kChain >= in) {
        t.bias = shift;
        t.hard_swish = p.hard_swish;
        if (p.add) t.after = p.add + n * out;
        t.ld_after = out;
      }
      mix_block(t, tokens, out, first, end);
      t.x += kChain;
      t.add = t.y;  // the next chain adds to what this one has stored
      t.ld_add = out;
      t.add_dtype = XK_F32;
    }
  }

  // Rows [k, k + K) of the panels after `first`: each is prefetched during the products of the panel before it. Not if
  // W stays in L1, or if a chain is part of panels of two sizes.
  Ahead next_panels(const float* w, int first, int end, int k, int K, int tokens) const {
    if (end - first < 2 || ld * in <= kSmallWeight || (K < in && panels.larger)) return {};
    const ptrdiff_t vector = VL<float> * sizeof(float), row = panels.size(first) * vector;
    const char* next = (const char*)w + panels.start(first + 1) * vector * in + k * row;
    const int share = calls(first, end - 1, K, tokens);
    if (K < in) return {next, in * row, K * row, end - first - 1, share};
    const ptrdiff_t rest = (panels.start(end) - panels.start(first + 1)) * vector * in;
    return {next, rest, rest, 1, share};
  }

  // Features [k, k + K) of the next block of tokens, which starts at token n.
  Ahead next_tokens(int64_t n, int first, int end, int k, int K, int tokens) const {
    const int64_t count = least(block, p.tokens - n);
    if (count <= 0) return {};
    const ptrdiff_t size = sizeof(float);
    return {(const char*)(p.x + n * in + k), in * size, K * size, count, calls(first, end, K, tokens)};
  }

  // Number of prefetches during the products of panels [first, end).
  int calls(int first, int end, int K, int tokens) const {
    const int columns = (panels.start(end) - panels.start(first)) * VL<float>;
    return prefetches<float>(K, tokens, columns, [](int nr) { return max_mix_rows(nr, 1); });
  }
};

inline void pack_linear(const xk_pack_linear_args& p) {
  const int in = int(p.dim_in), out = int(p.dim_out);
  const Cut panels(padded<float>(out) / VL<float>, kMaxNR);
  for (int i = 0; i < panels.parts; ++i) pack_panel(p.weight, in, 1, in, out, panels, i, p.packed);
}

}  // namespace
}  // namespace XK_LEVEL
}  // namespace xk
