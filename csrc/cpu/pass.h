// One pass over tokens. For each block of tokens, sized to fit L1, a pass
//   packs    its operands: from any strides and storage dtype to rows of T padded with zeros to whole vectors. Masked
//            tokens are zeroed, and rows are divided by their norm (feature norm), layer-normalised and centred, or
//            mapped by the feature map of linear attention, if requested;
//   grams    at most one pair of packed blocks: adds their product to a D x D matrix (and sums of squares);
//   mixes    multiplies each token's features by D x D operands into outputs.
// All tensors of size N are processed here; each operand is read from memory once per pass. This file defines a pass
// and packs operands; block.h runs a pass on a block.
//
// Packed rows are tokens. For channel-major operands (unit stride over tokens), rows are features wherever the products
// allow it, so that nothing is transposed.
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
  bool layer_norm = false;  // each token's row is layer-normalised
  int features = XK_IDENTITY_FEATURES;
  bool by_tokens = false, by_rows = false;  // packed with tokens as rows; with features as rows; see choose_rows

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
  T* g = nullptr;      // dim_a x padded(dim_b), added to
};

template <class T>
struct Mix {
  int x = -1, x2 = -1, add = -1;  // operand indices
  const T *w = nullptr, *w2 = nullptr, *bias = nullptr, *scale = nullptr;
  int unit = -1;  // operand whose unit_rows, layer_norm or features are differentiated: y is the gradient with respect
                  // to that operand
  bool by_panels = false;  // w and w2 are by panels (mix_block in tile.h)
  int ahead = -1;          // operand whose next block is prefetched during this mix
  Operand y;               // stride_d == 1, or stride_n == 1
};

constexpr int kMaxOperands = 4, kMaxMixes = 3;

// The denominators of linear attention, d[n] = <row n of an operand, z> + eps. In the forward, row n of the mix is
// multiplied by scale / d[n]. In the backward, the packed rows of another operand are, and the mix that differentiates
// the features includes the derivative of d.
template <class T>
struct Quotient {
  int of = -1, scaled = -1;  // operand indices: of the denominators; whose packed rows are multiplied
  const T* z = nullptr;      // padded; null: d[n] = 1
  T eps = 0, scale = 1;
  T* dz = nullptr;  // backward: the gradient of z is added to it; padded
};

template <class T>
struct Pass {
  Operand in[kMaxOperands];
  T* ssq[kMaxOperands] = {};           // the operand's sums of squares are added to it, if given; padded
  T* sums[kMaxOperands] = {};          // likewise for its sums
  const T* center[kMaxOperands] = {};  // subtracted from each of its rows, if given; padded with zeros
  int operands = 0;
  Gram<T> gram;
  Quotient<T> quotient;
  Mix<T> mix[kMaxMixes];
  int mixes = 0;
  const uint8_t* mask = nullptr;
  int64_t mask_stride = 0;
  T eps = 0;
  // Products of bf16 pairs: operands of the Gram are packed as pairs of tokens; operands of mixes are read in place as
  // pairs of features, and W has pairs of rows. Requires bf16 with unit stride over features, an even number of
  // features, an even stride over tokens, no mask and no unit_rows.
  bool pairs = false;
  bool by_rows = false;  // mixes have features as rows
};

template <class T>
constexpr int kNative = sizeof(T) == sizeof(double) ? XK_F64 : XK_F32;

// Chooses how each operand of a pass is packed, if at all.
template <class T>
void choose_rows(Pass<T>& pass) {
  const Gram<T>& gram = pass.gram;
  const Quotient<T>& quotient = pass.quotient;
  // i = -1 (no operand) does not prevent it
  auto may_be_rows = [&](int i) {
    if (i < 0) return true;
    if (kByLane) return false;  // each kind of tile supports only one memory order of its elements
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

// Packs with tokens as rows. norms receives, per token, the norm before the clamp (unit_rows), or
// 1 / sqrt(variance + eps) (layer_norm).
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

// Packs with features as rows, of padded(tokens) columns.
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
