// One pass over token-major data. For a block of tokens that fits the first-level cache, a pass
//   packs    its operands: any strides and storage dtype -> rows of T padded with zeros to whole vectors, masked tokens
//            zeroed, rows divided by their norm where the feature norm is asked for, or layer-normalised and centred,
//            or by the feature map of linear attention;
//   grams    at most one pair of packed blocks into an accumulated D x D matrix (and sums of squares);
//   mixes    each token's features by D x D operands into outputs.
// Everything of size N goes through here; each operand is read from memory once per pass.
#pragma once

#include "features.h"
#include "rows.h"
#include "tile.h"

namespace xk {
namespace XK_LEVEL {

struct Operand {
  const char* data = nullptr;  // first token, first feature
  int64_t stride_n = 0, stride_d = 0;
  int dtype = 0, dim = 0;
  bool unit_rows = false;   // feature norm: each token's row is divided by max(norm, eps)
  bool layer_norm = false;  // each token's row has its mean subtracted and is divided by its spread
  int features = XK_IDENTITY_FEATURES;
};

inline Operand operand(const xk_tensor& t, int64_t b, int64_t h, int dim, bool unit_rows = false) {
  Operand o;
  o.data = (const char*)t.data + (b * t.stride_b + h * t.stride_h) * itemsize(t.dtype);
  o.stride_n = t.stride_n;
  o.stride_d = t.stride_d;
  o.dtype = t.dtype;
  o.dim = dim;
  o.unit_rows = unit_rows;
  return o;
}

template <class T>
struct Gram {
  int a = -1, b = -1;  // operand indices; a is b for a symmetric Gram
  T* g = nullptr;      // dim_a x padded(dim_b), accumulated into
};

template <class T>
struct Mix {
  int x = -1, x2 = -1, add = -1;  // operand indices
  const T *w = nullptr, *w2 = nullptr, *bias = nullptr, *scale = nullptr;
  int unit = -1;   // operand whose unit_rows, layer_norm or features are differentiated: y is a gradient with respect
                   // to that row
  int ahead = -1;  // operand whose next block is fetched while this one is mixed
  Operand y;       // stride_d == 1, or stride_n == 1
};

constexpr int kMaxOperands = 4, kMaxMixes = 3;

// Linear attention's denominators d[n] = <row n of an operand, z> + eps. Forward, row n of the mix is multiplied by
// scale / d[n]; backward, so are rows of another operand when they are packed, and the mix that differentiates the
// features takes the derivative of d too.
template <class T>
struct Quotient {
  int of = -1, scaled = -1;  // operand indices
  const T* z = nullptr;      // padded; null: d[n] = 1
  T eps = 0, scale = 1;
  T* dz = nullptr;  // backward: added to; padded
};

template <class T>
struct Pass {
  Operand in[kMaxOperands];
  T* ssq[kMaxOperands] = {};           // where an operand's sums of squares are added, if anywhere; padded
  T* sums[kMaxOperands] = {};          // its sums likewise
  const T* center[kMaxOperands] = {};  // subtracted from each of its rows, if given; padded with zeros
  int operands = 0;
  Gram<T> gram;
  Quotient<T> quotient;
  Mix<T> mix[kMaxMixes];
  int mixes = 0;
  const uint8_t* mask = nullptr;
  int64_t mask_stride = 0;
  T eps = 0;
  // bf16 by pairs: the operands of the Gram are packed by pairs of tokens, those of mixes are read where they lie as
  // pairs of features, and their W has pairs of rows. For bf16 rows of unit stride, an even number of features and an
  // even distance between tokens, no mask and no unit_rows.
  bool pairs = false;
};

template <class T>
constexpr int kNative = sizeof(T) == sizeof(double) ? XK_F64 : XK_F32;

// norms: per token, the norm before the clamp (unit_rows), or one over the spread (layer_norm).
template <class T>
void pack(const Pass<T>& pass, int index, int64_t first, int tokens, T* out, T* norms) {
  const Operand& o = pass.in[index];
  T* ssq = pass.ssq[index];
  int ld = padded<T>(o.dim);
  T* sums = pass.sums[index];
  const T* center = pass.center[index];
  bool rows = o.stride_d == 1 || o.dim == 1;
  bool squares_on_the_way = ssq && rows && !pass.mask && !o.layer_norm && !center;
  with_storage<T>(o.dtype, [&](auto* storage) {
    auto p = (decltype(storage))o.data + first * o.stride_n;
    if (!rows && o.stride_n == 1)
      pack_transposed(p, o.stride_d, tokens, o.dim, out, ld);
    else if (!rows)
      pack_strided(p, o.stride_n, o.stride_d, tokens, o.dim, out, ld);
    else if (squares_on_the_way)
      pack_rows<T, true>(p, o.stride_n, tokens, o.dim, out, ld, ssq);
    else
      pack_rows<T, false>(p, o.stride_n, tokens, o.dim, out, ld, ssq);
  });
  if (o.layer_norm) layer_norm_rows(out, norms, tokens, o.dim, ld, pass.eps);
  if (center)
    for (int c = 0; c < ld; c += VL<T>) {
      V<T> shift = load(center + c);
      for (int n = 0; n < tokens; ++n) store(out + (ptrdiff_t)n * ld + c, load(out + (ptrdiff_t)n * ld + c) - shift);
    }
  if (o.features != XK_IDENTITY_FEATURES) apply_features(o.features, out, tokens, o.dim, ld);
  if (pass.mask)
    for (int n = 0; n < tokens; ++n)
      if (!pass.mask[(first + n) * pass.mask_stride]) memset(out + (ptrdiff_t)n * ld, 0, ld * sizeof(T));
  if (sums)
    for (int c = 0; c < ld; c += VL<T>) {
      V<T> sum = {};
      for (int n = 0; n < tokens; ++n) sum += load(out + (ptrdiff_t)n * ld + c);
      store(sums + c, load(sums + c) + sum);
    }
  if (ssq && !squares_on_the_way)
    for (int c = 0; c < ld; c += VL<T>) {
      V<T> squares = {};
      for (int n = 0; n < tokens; ++n) {
        V<T> x = load(out + (ptrdiff_t)n * ld + c);
        squares += x * x;
      }
      store(ssq + c, load(ssq + c) + squares);
    }
  if (o.unit_rows)
    for (int n = 0; n < tokens; ++n) {
      T* row = out + (ptrdiff_t)n * ld;
      V<T> squares = {};
      for (int c = 0; c < ld; c += VL<T>) squares += load(row + c) * load(row + c);
      T norm = T(__builtin_sqrt(sum_lanes<T>(squares)));
      V<T> inverse = broadcast(1 / (norm < pass.eps ? pass.eps : norm));
      for (int c = 0; c < ld; c += VL<T>) store(row + c, load(row + c) * inverse);
      norms[n] = norm;
    }
}

// Tokens per block, and the scratch that one thread needs for a pass whose widest operand has `dim` features.
template <class T>
int block_tokens(int dim) {
  int tokens = 8192 / int(sizeof(T)) / padded<T>(dim) / 12 * 12;
  return tokens < 12 ? 12 : tokens > 96 ? 96 : tokens;
}
template <class T>
size_t pass_scratch(int dim) {
  size_t tokens = block_tokens<T>(dim);
  return (kMaxOperands + 1) * tokens * padded<T>(dim) + (kMaxOperands + 2) * tokens;
}

// Tokens [first, first + tokens) of one (batch, head), tokens <= block_tokens(widest). scratch: pass_scratch(widest).
template <class T>
void run_block(const Pass<T>& pass, int64_t first, int tokens, const Pass<T>* next, int64_t next_first, int widest,
               T* scratch) {
  ptrdiff_t block = (ptrdiff_t)block_tokens<T>(widest) * padded<T>(widest);
  T *packed[kMaxOperands], *norms[kMaxOperands], *staged = scratch + kMaxOperands * block;
  bool used_packed[kMaxOperands] = {};
  const Gram<T>& gram = pass.gram;
  if (gram.g) used_packed[gram.a] = used_packed[gram.b] = true;
  for (int m = 0; m < pass.mixes; ++m) {
    if (pass.mix[m].unit >= 0) used_packed[pass.mix[m].unit] = true;
  }
  const Quotient<T>& quotient = pass.quotient;
  if (quotient.of >= 0) used_packed[quotient.of] = true;
  if (quotient.scaled >= 0) used_packed[quotient.scaled] = true;
  auto ahead = [&](const Operand& o) {
    ptrdiff_t size = itemsize(o.dtype), row = (o.stride_d == 1 ? o.stride_n : o.stride_d) * size;
    const char* base = o.data + next_first * o.stride_n * size;
    ptrdiff_t used = o.stride_d == 1 ? o.dim * size : o.stride_n == 1 ? tokens * size : 0;
    return Ahead{base, row, used ? (((ptrdiff_t)base & 63) + used + 63) / 64 : 0, o.stride_d == 1 ? 0 : o.dim};
  };
  constexpr bool kMayPair = kPairs && sizeof(T) == sizeof(float);
  const bool pairs = kMayPair && pass.pairs;
  for (int i = 0; i < pass.operands; ++i) {
    packed[i] = scratch + i * block;
    norms[i] = staged + block + i * block_tokens<T>(widest);
    if constexpr (kMayPair)
      if (pairs) {
        if (!used_packed[i] && !pass.ssq[i]) continue;
        const Operand& o = pass.in[i];
        const bf16* p = (const bf16*)o.data + first * o.stride_n;
        int ld = padded<T>(o.dim);
        if (pass.ssq[i])
          pack_pairs<true>(p, o.stride_n, tokens, o.dim, packed[i], ld, pass.ssq[i]);
        else
          pack_pairs<false>(p, o.stride_n, tokens, o.dim, packed[i], ld, nullptr);
        continue;
      }
    used_packed[i] = used_packed[i] || pass.ssq[i] || pass.sums[i] || pass.center[i] || pass.in[i].unit_rows ||
                     pass.in[i].layer_norm || pass.in[i].features || pass.in[i].dtype != kNative<T> ||
                     pass.in[i].stride_d != 1;
    if (used_packed[i]) pack(pass, i, first, tokens, packed[i], norms[i]);
  }

  // one over the denominators, and scratch
  T *inverse = nullptr, *along = staged + block + (kMaxOperands + 1) * block_tokens<T>(widest);
  if (quotient.z) {
    inverse = along - block_tokens<T>(widest);
    row_dots(packed[quotient.of], quotient.z, 0, tokens, padded<T>(pass.in[quotient.of].dim), inverse);
    for (int n = 0; n < tokens; ++n) inverse[n] = 1 / (inverse[n] + quotient.eps);
  }
  if (quotient.scaled < 0 && quotient.scale != 1) {
    const bool ones = !inverse;
    if (ones) inverse = along - block_tokens<T>(widest);
    for (int n = 0; n < tokens; ++n) inverse[n] = ones ? quotient.scale : quotient.scale * inverse[n];
  }
  if (quotient.scaled >= 0) {
    const int ld = padded<T>(pass.in[quotient.scaled].dim);
    for (int n = 0; n < tokens; ++n) {
      T* row = packed[quotient.scaled] + (ptrdiff_t)n * ld;
      V<T> by = broadcast(inverse ? quotient.scale * inverse[n] : quotient.scale);
      for (int c = 0; c < ld; c += VL<T>) store(row + c, load(row + c) * by);
    }
  }

  if (gram.g) {
    int dim_a = pass.in[gram.a].dim, dim_b = pass.in[gram.b].dim, ldg = padded<T>(dim_b);
    GramTile<T> t{packed[gram.a],
                  packed[gram.b],
                  padded<T>(dim_a),
                  ldg,
                  tokens,
                  gram.g,
                  ldg,
                  next ? ahead(next->in[gram.a]) : Ahead{},
                  next && gram.a != gram.b ? ahead(next->in[gram.b]) : Ahead{},
                  0};
    if constexpr (kMayPair)
      if (pairs) {
        t.tokens = (tokens + 1) / 2;
        gram_block<T, true>(t, dim_a, dim_b, false);
      }
    if (!pairs) gram_block(t, dim_a, dim_b, gram.a == gram.b);
  }

  for (int m = 0; m < pass.mixes; ++m) {
    const Mix<T>& mix = pass.mix[m];
    int ld = padded<T>(mix.y.dim), size = itemsize(mix.y.dtype);
    char* y = (char*)mix.y.data + first * mix.y.stride_n * size;
    MixTile<T> t{};
    t.ahead0 = next && mix.ahead >= 0 ? ahead(next->in[mix.ahead]) : Ahead{};
    t.ahead1 = next ? ahead(next->mix[m].y) : Ahead{};
    // An operand that need not be packed is read where it lies.
    auto in_place = [&](int i) { return pass.in[i].data + first * pass.in[i].stride_n * itemsize(pass.in[i].dtype); };
    auto source = [&](int i, const T*& x, ptrdiff_t& row, ptrdiff_t& k, ptrdiff_t& K) {
      const Operand& o = pass.in[i];
      K = pairs ? o.dim / 2 : o.dim;
      x = used_packed[i] && !pairs ? packed[i] : (const T*)in_place(i);
      row = pairs ? o.stride_n / 2 : used_packed[i] ? padded<T>(o.dim) : o.stride_n;
      k = pairs || used_packed[i] ? 1 : o.stride_d;
    };
    source(mix.x, t.x, t.x_row, t.x_k, t.K);
    if (mix.x2 >= 0) source(mix.x2, t.x2, t.x2_row, t.x2_k, t.K2);
    t.w = mix.w;
    t.w2 = mix.w2;
    t.ldw = ld;
    t.bias = mix.bias;
    t.scale = mix.scale;
    if (quotient.scaled < 0) t.divided = inverse;
    const bool layer_norm = mix.unit >= 0 && pass.in[mix.unit].layer_norm;
    if (mix.add >= 0 && !layer_norm) {
      const Operand& o = pass.in[mix.add];
      bool lies = o.stride_d == 1;
      t.add = lies ? (const void*)in_place(mix.add) : packed[mix.add];
      t.ld_add = lies ? o.stride_n : padded<T>(o.dim);
      t.add_dtype = lies ? o.dtype : kNative<T>;
    }
    const bool across = mix.y.stride_d != 1 && mix.y.dim > 1;  // tokens lie side by side
    if (mix.unit < 0 && !across) {
      t.y = y;
      t.ldy = mix.y.stride_n;
      t.dtype = mix.y.dtype;
      if constexpr (kMayPair)
        if (pairs) mix_block<T, true>(t, tokens, mix.y.dim, size);
      if (!pairs) mix_block(t, tokens, mix.y.dim, size);
    } else {
      t.y = staged;
      t.ldy = ld;
      t.dtype = kNative<T>;
      mix_block(t, tokens, ld, int(sizeof(T)));
      if (layer_norm) {
        const T* add = nullptr;
        ptrdiff_t ld_add = 0, step = 0, columns = 0;
        if (mix.add >= 0) source(mix.add, add, ld_add, step, columns);
        layer_norm_backward(staged, packed[mix.unit], pass.center[mix.unit], norms[mix.unit], add, ld_add, tokens,
                            mix.y.dim, ld);
      } else if (mix.unit >= 0 && !pass.in[mix.unit].unit_rows) {
        const T* u = packed[mix.unit];
        if (quotient.z) quotient_backward(staged, u, quotient.z, inverse, along, quotient.dz, tokens, ld);
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
}

}  // namespace XK_LEVEL
}  // namespace xk
