// A linear layer on float32 rows, fused with the norms and the activation around it:
//
//     y = act(batch_norm(layer_norm(x) w^T + bias)) + add
//
// W, with batch norm folded in, is packed once per call, or in advance by pack_linear: rows are input features, padded
// to whole vectors of output features. Each block of tokens is layer-normalised into scratch rows, if there is a layer
// norm, and multiplied by the register tiles of tile.h.
#pragma once

#include "norm.h"

namespace xk {
namespace XK_LEVEL {
namespace {

constexpr int64_t kLinearWork = 600'000;  // minimum multiply-adds per thread: about 5 us
constexpr int kChain = 512;           // products summed sequentially: with more, the error would exceed that of torch
constexpr int64_t kLinearBlock = 96;  // maximum tokens of a block, so that it stays in L2

class Linear {
 public:
  explicit Linear(const xk_linear_args& p)
      : p(p),
        in(int(p.dim_in)),
        out(int(p.dim_out)),
        ld(padded<float>(out)),
        ld_in(padded<float>(in)),
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
    const int vectors = ld / VL<float>;
    if (threads > 1 && out >= p.tokens && vectors >= threads)
      by_columns(vectors);
    else
      by_tokens();
    return XK_OK;
  }

 private:
  const xk_linear_args& p;
  const int in, out, ld, ld_in, threads;
  const int64_t block, rows_size;
  Buffer<float> w, rows;
  float *const shift, *const scale, *const own;  // own: W as packed by this call

  // Threads pack the rows of W together, wait at a barrier, and then process blocks of tokens.
  void by_tokens() {
    const int64_t vectors = ld_in / VL<float>, blocks = divide_up(p.tokens, block);
    together(threads, [&](int thread, int count, auto wait) {
      auto share = [&](int64_t total, int which) { return total * which / count; };
      if (!p.packed) {
        pack(share(vectors, thread) * VL<float>, least(share(vectors, thread + 1) * VL<float>, in), 0, out, own, ld);
        wait();  // each thread reads all of W
      }
      for (int64_t b = share(blocks, thread); b < share(blocks, thread + 1); ++b)
        mix(b * block, 0, out, p.packed ? p.packed : own, ld, rows.data + thread * rows_size);
    });
  }

  // For few tokens and a large W: each thread packs some columns of W and uses them for all tokens.
  void by_columns(int vectors) {
    parallel_for(threads, threads, [&](int64_t part, int thread) {
      const int first = int(vectors * part / threads) * VL<float>;
      const int end = int(least(vectors * (part + 1) / threads * VL<float>, out)), wide = padded<float>(end - first);
      float* columns = own + (size_t)first * in;
      if (!p.packed) pack(0, in, first, end, columns, wide);
      for (int64_t n = 0; n < p.tokens; n += block)
        mix(n, first, end, p.packed ? p.packed + first : columns, p.packed ? ld : wide, rows.data + thread * rows_size);
    });
  }

  // Writes W[first:end, i0:i1]^T to rows i0:i1 of w, with columns multiplied by scale.
  void pack(int64_t i0, int64_t i1, int first, int end, float* w, int ld) const {
    if (i0 >= i1) return;
    float* to = w + i0 * ld;
    pack_transposed<float>(p.weight + (int64_t)first * in + i0, in, int(i1 - i0), end - first, to, ld);
    if (!p.norm.variance) return;
    for (int64_t i = i0; i < i1; ++i, to += ld)
      for (int c = 0; c < ld; c += VL<float>) store(to + c, load(to + c) * load(scale + first + c));
  }

  // Output columns [first, end) of a block of tokens.
  void mix(int64_t n, int first, int end, const float* w, int ld, float* normed) const {
    const int tokens = int(least(block, p.tokens - n));
    Ahead nothing[2];
    MixTile<float> t{};
    t.ahead = nothing;
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
    t.ldw = ld;
    t.y = p.y + n * out + first;
    t.ldy = out;
    t.dtype = XK_F32;
    for (int k = 0; k < in; k += kChain) {
      t.K = int(least(kChain, in - k));
      t.w = w + (ptrdiff_t)k * ld;
      if (k + kChain >= in) {
        t.bias = shift + first;
        t.hard_swish = p.hard_swish;
        if (p.add) t.after = p.add + n * out + first;
        t.ld_after = out;
      }
      mix_block(t, tokens, end - first, int(sizeof(float)));
      t.x += kChain;
      t.add = t.y;  // the next chain adds to what this one has stored
      t.ld_add = out;
      t.add_dtype = XK_F32;
    }
  }
};

inline void pack_linear(const xk_pack_linear_args& p) {
  const int out = int(p.dim_out);
  pack_transposed<float>(p.weight, p.dim_in, int(p.dim_in), out, p.packed, padded<float>(out));
}

}  // namespace
}  // namespace XK_LEVEL
}  // namespace xk
