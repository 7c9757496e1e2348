// Runs a pass on one block of tokens.
#pragma once

#include "pass.h"

namespace xk {
namespace XK_LEVEL {

// Tokens per block, a multiple of what tiles and vectors use: as many as fit L1 or, if the products are wider than
// that, L2, where a panel of a Gram product must still fit L1. by_rows: for channel-major operands, whose rows are far
// apart in memory: reading more tokens of each row is better.
template <class T>
int block_tokens(int dim, bool by_rows = false) {
  const int multiple = by_rows ? VL<T> : 12;
  const bool wide = !by_rows && dim > 64;
  const int narrow = kRegisters < 32 ? 10 << 10 : 8 << 10;  // bytes; measured with 16 registers
  const int bytes = by_rows ? 16 << 10 : wide ? 192 << 10 : narrow;
  const int most =
      wide ? least_of(kMostTokens, (16 << 10) / (kMaxNR * kVectorBytes) / multiple * multiple) : kMostTokens;
  const int tokens = bytes / int(sizeof(T)) / padded<T>(dim) / multiple * multiple;
  return tokens < multiple ? multiple : tokens > most ? most : tokens;
}
// The scratch of one thread for a pass whose widest operand has `dim` features: packed blocks, and numbers per token.
template <class T>
size_t row_of_tokens(int dim) {
  const int tokens = block_tokens<T>(dim), by_rows = block_tokens<T>(dim, true);
  return padded<T>(tokens > by_rows ? tokens : by_rows);
}
template <class T>
size_t pass_scratch(int dim) {
  return row_of_tokens<T>(dim) * ((2 * kMaxOperands + 1) * padded<T>(dim) + kMaxOperands + 2);
}

constexpr int kHeadsTogether = 8;  // few enough that the descriptions of their passes stay in cache

// The heads whose blocks of the same tokens are processed one after another, and the index of the current head.
template <class T>
struct Heads {
  Pass<T> passes[kHeadsTogether];
  int count, index;
  int64_t tokens, end;  // tokens per block; end of the unit's tokens
};

// A pass over tokens [first, first + tokens) of one (batch, head), tokens <= block_tokens(widest). scratch: that of the
// thread, of size pass_scratch(widest).
template <class T>
class Block {
 public:
  Block(const Heads<T>& heads, int64_t first, int tokens, int widest, T* scratch)
      : heads(heads), pass(heads.passes[heads.index]), first(first), tokens(tokens), row(padded<T>(tokens)) {
    const size_t columns = row_of_tokens<T>(widest), size = columns * padded<T>(widest);
    staged = scratch + 2 * kMaxOperands * size;
    for (int i = 0; i < kMaxOperands; ++i) {
      packed[i] = scratch + i * size;
      features[i] = scratch + (kMaxOperands + i) * size;
      norms[i] = staged + size + i * columns;
    }
    factors = staged + size + kMaxOperands * columns;
    along = factors + columns;
  }

  void run() {
    for (int i = 0; i < pass.operands; ++i) pack_operand(i);
    take_quotient();
    if (pass.gram.g) add_gram();
    for (int m = 0; m < pass.mixes; ++m) {
      if (pass.by_rows)
        mix_by_rows(pass.mix[m]);
      else
        mix_by_tokens(pass.mix[m]);
    }
  }

 private:
  static constexpr bool kMayPair = kPairs && sizeof(T) == sizeof(float);

  const Heads<T>& heads;
  const Pass<T>& pass;
  const int64_t first;
  const int tokens, row;  // row: columns per row with features as rows
  Ahead asked[2];
  T *packed[kMaxOperands], *features[kMaxOperands], *norms[kMaxOperands], *staged;
  T *factors, *along;    // per token: the factor of the mix; scratch
  bool divided = false;  // whether factors are used

  bool pairs() const { return kMayPair && pass.pairs; }

  // What to prefetch of an operand or result, of(pass), in `calls` calls. If the heads of a token are adjacent in
  // memory, each head's block prefetches all heads of a share of the next tokens; otherwise, the tokens of the next
  // head.
  template <class F>
  Ahead ahead(int calls, F of) const {
    const Operand &o = of(heads.passes[0]), &last = of(heads.passes[heads.count - 1]);
    if (o.stride_d != 1) return {};  // packing and writing of channel-major tokens have their own prefetches
    const ptrdiff_t size = itemsize(o.dtype), row = o.stride_n * size, bytes = o.dim * size;
    const int64_t next = first + heads.tokens;
    if (last.data - o.data == (heads.count - 1) * bytes) {
      const int64_t share = (heads.tokens + heads.count - 1) / heads.count, from = next + heads.index * share;
      const int64_t end = next + heads.tokens < heads.end ? next + heads.tokens : heads.end;
      if (from >= end) return {};
      return {o.data + from * row, row, heads.count * bytes, end - from < share ? end - from : share, calls};
    }
    const bool wraps = heads.index + 1 == heads.count;
    if (wraps && next >= heads.end) return {};
    return {of(heads.passes[wraps ? 0 : heads.index + 1]).data + (wraps ? next : first) * row, row, bytes, tokens,
            calls};
  }

  void pack_operand(int i) {
    const Operand& o = pass.in[i];
    if constexpr (kMayPair)
      if (pairs()) {
        if (!o.by_tokens) return;
        const bf16* p = (const bf16*)o.data + first * o.stride_n;
        if (pass.ssq[i])
          pack_pairs<true>(p, o.stride_n, tokens, o.dim, packed[i], padded<T>(o.dim), pass.ssq[i]);
        else
          pack_pairs<false>(p, o.stride_n, tokens, o.dim, packed[i], padded<T>(o.dim), nullptr);
        return;
      }
    if (o.by_rows) pack_by_rows(pass, i, first, tokens, features[i]);
    if (o.by_tokens) pack(pass, i, first, tokens, packed[i], norms[i]);
  }

  void take_quotient() {
    const Quotient<T>& quotient = pass.quotient;
    divided = quotient.z || quotient.scale != 1;
    if (quotient.z) {
      const int dim = pass.in[quotient.of].dim;
      if (pass.by_rows)
        column_dots(features[quotient.of], quotient.z, dim, row, factors);
      else
        row_dots(packed[quotient.of], quotient.z, 0, tokens, padded<T>(dim), factors);
      for (int n = 0; n < row; ++n) factors[n] = 1 / (factors[n] + quotient.eps);
    }
    if (quotient.scaled < 0) {
      if (quotient.scale != 1)
        for (int n = 0; n < row; ++n) factors[n] = quotient.z ? quotient.scale * factors[n] : quotient.scale;
      return;
    }
    if (!divided) return;
    const Operand& o = pass.in[quotient.scaled];
    for (int n = 0; n < row; ++n) along[n] = quotient.z ? quotient.scale * factors[n] : quotient.scale;
    if (o.by_tokens)
      for (int n = 0; n < tokens; ++n) {
        T* p = packed[quotient.scaled] + (ptrdiff_t)n * padded<T>(o.dim);
        for (int c = 0; c < padded<T>(o.dim); c += VL<T>) store(p + c, load(p + c) * broadcast(along[n]));
      }
    if (o.by_rows)
      for (int d = 0; d < o.dim; ++d) {
        T* p = features[quotient.scaled] + (ptrdiff_t)d * row;
        for (int n = 0; n < row; n += VL<T>) store(p + n, load(p + n) * load(along + n));
      }
  }

  void add_gram() {
    const Gram<T>& gram = pass.gram;
    const Operand &a = pass.in[gram.a], &b = pass.in[gram.b];
    const int ldg = padded<T>(b.dim);
    const bool by_rows = a.by_rows && gram.a != gram.b;
    GramTile<T> t{};
    t.a = by_rows ? features[gram.a] : packed[gram.a];
    t.a_row = by_rows ? row : 1;
    t.a_k = by_rows ? 1 : padded<T>(a.dim);
    t.b = packed[gram.b];
    t.ldb = t.ldg = ldg;
    t.g = gram.g;
    t.tokens = pairs() ? (tokens + 1) / 2 : tokens;
    int calls = prefetches<T>(int(t.tokens), a.dim, b.dim, [](int nr) { return max_gram_rows<T>(nr, 1); });
    if (gram.a == gram.b) calls = (calls + 1) / 2;  // tiles above the diagonal are left out
    asked[0] = ahead(calls, [&](const Pass<T>& p) -> const Operand& { return p.in[gram.a]; });
    asked[1] = Ahead();
    if (gram.a != gram.b) asked[1] = ahead(calls, [&](const Pass<T>& p) -> const Operand& { return p.in[gram.b]; });
    t.ahead = asked;
    if constexpr (kMayPair)
      if (pairs()) gram_block<T, true>(t, a.dim, b.dim, false);
    if (!pairs()) gram_block(t, a.dim, b.dim, gram.a == gram.b);
  }

  const char* at(int i) const { return pass.in[i].data + first * pass.in[i].stride_n * itemsize(pass.in[i].dtype); }
  char* result(const Mix<T>& mix) const { return (char*)mix.y.data + first * mix.y.stride_n * itemsize(mix.y.dtype); }

  MixTile<T> tile(const Mix<T>& mix) {
    MixTile<T> t{};
    const ptrdiff_t index = &mix - pass.mix;
    const int rows = pass.by_rows ? mix.y.dim : tokens, cols = pass.by_rows ? tokens : mix.y.dim;
    const int K = pairs() ? pass.in[mix.x].dim / 2 : pass.in[mix.x].dim;
    const int calls = prefetches<T>(K, rows, cols, [](int nr) { return max_mix_rows(nr, 1); });
    asked[0] = Ahead();
    if (mix.ahead >= 0) asked[0] = ahead(calls, [&](const Pass<T>& p) -> const Operand& { return p.in[mix.ahead]; });
    asked[1] = ahead(calls, [&](const Pass<T>& p) -> const Operand& { return p.mix[index].y; });
    t.ahead = asked;
    t.bias = mix.bias;
    t.scale = mix.scale;
    if (divided && pass.quotient.scaled < 0) t.divided = factors;
    return t;
  }

  // An operand that is not packed is read in place.
  void source(int i, const T*& x, ptrdiff_t& row_stride, ptrdiff_t& K) const {
    const Operand& o = pass.in[i];
    const bool is_packed = o.by_tokens && !pairs();
    K = pairs() ? o.dim / 2 : o.dim;
    x = is_packed ? packed[i] : (const T*)at(i);
    row_stride = pairs() ? o.stride_n / 2 : is_packed ? padded<T>(o.dim) : o.stride_n;
  }

  void mix_by_tokens(const Mix<T>& mix) {
    const Quotient<T>& quotient = pass.quotient;
    const int ld = padded<T>(mix.y.dim), size = itemsize(mix.y.dtype);
    char* y = result(mix);
    MixTile<T> t = tile(mix);
    source(mix.x, t.x, t.x_row, t.K);
    t.x_k = 1;
    if (mix.x2 >= 0) source(mix.x2, t.x2, t.x2_row, t.K2);
    t.w = mix.w;
    t.w2 = mix.w2;
    t.ldw = ld;
    if (mix.by_panels) t.panel_rows = t.K;
    const bool layer_norm = mix.unit >= 0 && pass.in[mix.unit].layer_norm;
    if (mix.add >= 0 && !layer_norm) {
      const Operand& o = pass.in[mix.add];
      bool lies = o.stride_d == 1;
      t.add = lies ? (const void*)at(mix.add) : packed[mix.add];
      t.ld_add = lies ? o.stride_n : padded<T>(o.dim);
      t.add_dtype = lies ? o.dtype : kNative<T>;
    }
    const bool across = mix.y.channel_major();
    if (mix.unit < 0 && !across) {
      t.y = y;
      t.ldy = mix.y.stride_n;
      t.dtype = mix.y.dtype;
      if constexpr (kMayPair)
        if (pairs()) mix_block<T, true>(t, tokens, mix.y.dim);
      if (!pairs()) mix_block(t, tokens, mix.y.dim);
    } else {
      t.y = staged;
      t.ldy = ld;
      t.dtype = kNative<T>;
      mix_block(t, tokens, ld);
      if (layer_norm) {
        const T* add = nullptr;
        ptrdiff_t ld_add = 0, columns = 0;
        if (mix.add >= 0) source(mix.add, add, ld_add, columns);
        layer_norm_backward(staged, packed[mix.unit], pass.center[mix.unit], norms[mix.unit], add, ld_add, tokens,
                            mix.y.dim, ld);
      } else if (mix.unit >= 0 && !pass.in[mix.unit].unit_rows) {
        const T* u = packed[mix.unit];
        if (quotient.z) quotient_backward(staged, u, quotient.z, factors, along, quotient.dz, tokens, ld);
        features_backward(pass.in[mix.unit].features, staged, u, tokens, mix.y.dim, ld);
      } else if (mix.unit >= 0) {
        unit_rows_backward(staged, packed[mix.unit], norms[mix.unit], tokens, ld, pass.eps);
      }
      if (pass.mask && across)
        for (int n = 0; n < tokens; ++n)
          if (!pass.mask[(first + n) * pass.mask_stride]) memset(staged + (ptrdiff_t)n * ld, 0, ld * sizeof(T));
      with_storage<T>(mix.y.dtype, [&](auto* storage) {
        auto to = (decltype(storage))y;
        if (across)
          unpack_transposed(staged, ld, tokens, mix.y.dim, to, mix.y.stride_d);
        else
          unpack(staged, ld, tokens, mix.y.dim, to, mix.y.stride_n);
      });
    }
    if (pass.mask && !across)
      for (int n = 0; n < tokens; ++n)
        if (!pass.mask[(first + n) * pass.mask_stride])
          memset(y + n * mix.y.stride_n * size, 0, (size_t)mix.y.dim * size);
  }

  // The transposed product: w is the left operand, and x has features as rows.
  void mix_by_rows(const Mix<T>& mix) {
    const Quotient<T>& quotient = pass.quotient;
    const int dim = mix.y.dim, size = itemsize(mix.y.dtype);
    char* y = result(mix);
    for (int d = 0; d < dim; ++d)  // prefetch the destination of the next block
      for (int line = 0; line < tokens * size; line += 64)
        __builtin_prefetch(y + d * mix.y.stride_d * size + tokens * size + line, 0, 2);
    MixTile<T> t = tile(mix);
    t.by_rows = true;
    t.x = mix.w;
    t.x_row = 1;
    t.x_k = padded<T>(dim);
    t.K = pass.in[mix.x].dim;
    t.w = features[mix.x];
    t.ldw = row;
    if (mix.add >= 0) {
      t.add = features[mix.add];
      t.ld_add = row;
      t.add_dtype = kNative<T>;
    }
    if (mix.unit < 0) {
      t.y = y;
      t.ldy = mix.y.stride_d;
      t.dtype = mix.y.dtype;
      mix_block(t, dim, tokens);
    } else {
      const T* u = features[mix.unit];
      t.y = staged;
      t.ldy = row;
      t.dtype = kNative<T>;
      mix_block(t, dim, row);
      if (quotient.z) quotient_backward_by_rows(staged, u, quotient.z, factors, along, quotient.dz, dim, row);
      features_backward(pass.in[mix.unit].features, staged, u, dim, tokens, row);
      with_storage<T>(mix.y.dtype,
                      [&](auto* storage) { unpack(staged, row, dim, tokens, (decltype(storage))y, mix.y.stride_d); });
    }
    if (pass.mask)
      for (int n = 0; n < tokens; ++n)
        if (!pass.mask[(first + n) * pass.mask_stride])
          for (int d = 0; d < dim; ++d) memset(y + (d * mix.y.stride_d + n) * size, 0, size);
  }
};

}  // namespace XK_LEVEL
}  // namespace xk
