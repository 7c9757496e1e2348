// One pass over tokens. For a block of tokens that fits the first-level cache, a pass
//   packs    its operands: any strides and storage dtype -> rows of T padded with zeros to whole vectors, masked tokens
//            zeroed, rows divided by their norm where the feature norm is asked for, or layer-normalised and centred,
//            or by the feature map of linear attention;
//   grams    at most one pair of packed blocks into an accumulated D x D matrix (and sums of squares);
//   mixes    each token's features by D x D operands into outputs.
// Everything of size N goes through here; each operand is read from memory once per pass. This file says what a pass is
// and packs operands; block.h runs a pass on a block.
//
// Packed rows are tokens. Those of channel-major operands (unit stride from token to token) are features instead,
// wherever the products allow: then nothing is transposed.
#pragma once

#include <initializer_list>

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
  bool by_tokens = false, by_rows = false;  // how it is packed: tokens as rows, features as rows; see choose_rows

  bool channel_major() const { return stride_n == 1 && stride_d != 1 && dim > 1; }
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

inline bool channel_major(const xk_tensor& t) { return t.stride_n == 1 && t.stride_d != 1; }

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
  bool by_rows = false;  // mixes: of features as rows
};

template <class T>
constexpr int kNative = sizeof(T) == sizeof(double) ? XK_F64 : XK_F32;

// How the operands of a pass are packed, if at all.
template <class T>
void choose_rows(Pass<T>& pass) {
  const Gram<T>& gram = pass.gram;
  const Quotient<T>& quotient = pass.quotient;
  // -1, no operand, has no objection.
  auto may_be_rows = [&](int i) {
    if (i < 0) return true;
    if (kByLane) return false;  // its tiles have one order of their elements each
    const Operand& o = pass.in[i];
    return o.channel_major() && !o.unit_rows && !o.layer_norm && o.features != XK_SOFTMAX_FEATURES;
  };
  pass.by_rows = pass.mixes > 0 && may_be_rows(quotient.of) && may_be_rows(quotient.scaled);
  for (int m = 0; m < pass.mixes; ++m) {
    const Mix<T>& mix = pass.mix[m];
    if (!mix.y.channel_major() || mix.x2 >= 0 || !may_be_rows(mix.x) || !may_be_rows(mix.add) || !may_be_rows(mix.unit))
      pass.by_rows = false;
  }
  auto need = [&](int i, bool rows) {
    if (i >= 0) (rows ? pass.in[i].by_rows : pass.in[i].by_tokens) = true;
  };
  if (gram.g) need(gram.a, gram.a != gram.b && may_be_rows(gram.a)), need(gram.b, false);
  need(quotient.of, pass.by_rows), need(quotient.scaled, pass.by_rows);
  for (int m = 0; m < pass.mixes; ++m) {
    const Mix<T>& mix = pass.mix[m];
    need(mix.unit, pass.by_rows);
    for (int i : {mix.x, mix.x2, mix.add}) {
      if (i < 0) continue;
      const Operand& o = pass.in[i];
      const bool as_it_lies =
          o.stride_d == 1 && o.dtype == kNative<T> && !o.unit_rows && !o.layer_norm && !o.features && !pass.center[i];
      if (pass.by_rows || !(as_it_lies || pass.pairs)) need(i, pass.by_rows);
    }
  }
  for (int i = 0; i < pass.operands; ++i)
    if ((pass.ssq[i] || pass.sums[i]) && !pass.in[i].by_tokens && !pass.in[i].by_rows) need(i, may_be_rows(i));
}

// Tokens as rows. norms: per token, the norm before the clamp (unit_rows), or one over the spread (layer_norm).
template <class T>
void pack(const Pass<T>& pass, int index, int64_t first, int tokens, T* out, T* norms) {
  const Operand& o = pass.in[index];
  T* ssq = o.by_rows ? nullptr : pass.ssq[index];
  int ld = padded<T>(o.dim);
  T* sums = o.by_rows ? nullptr : pass.sums[index];
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

// Features as rows, of padded(tokens) columns.
template <class T>
void pack_by_rows(const Pass<T>& pass, int index, int64_t first, int tokens, T* out) {
  const Operand& o = pass.in[index];
  const int ld = padded<T>(tokens);
  with_storage<T>(o.dtype, [&](auto* storage) {
    pack_features((decltype(storage))o.data + first, o.stride_d, tokens, o.dim, out, ld);
  });
  if (const T* center = pass.center[index])
    for (int d = 0; d < o.dim; ++d)
      for (int n = 0; n < tokens; n += VL<T>) {
        T* p = out + (ptrdiff_t)d * ld + n;
        store(p, load(p) - broadcast(center[d]));
      }
  if (o.features != XK_IDENTITY_FEATURES) apply_features(o.features, out, o.dim, tokens, ld);
  if (pass.mask)
    for (int n = 0; n < tokens; ++n)
      if (!pass.mask[(first + n) * pass.mask_stride])
        for (int d = 0; d < o.dim; ++d) out[(ptrdiff_t)d * ld + n] = 0;
  if (!pass.ssq[index] && !pass.sums[index]) return;
  for (int d = 0; d < o.dim; ++d) {
    V<T> sum = {}, squares = {};
    for (int n = 0; n < ld; n += VL<T>) {
      const V<T> x = load(out + (ptrdiff_t)d * ld + n);
      sum += x;
      squares += x * x;
    }
    if (pass.ssq[index]) pass.ssq[index][d] += sum_lanes<T>(squares);
    if (pass.sums[index]) pass.sums[index][d] += sum_lanes<T>(sum);
  }
}

}  // namespace XK_LEVEL
}  // namespace xk
