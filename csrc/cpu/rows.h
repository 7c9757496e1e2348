// Operations on rows of T, one per token, padded with zeros to whole vectors: packing from any strides and storage
// dtype, norms and their derivatives, and writing back.
#pragma once

#include "halves.h"

namespace xk {
namespace XK_LEVEL {

template <class T>
XK_INLINE int padded(int dim) {
  return (dim + VL<T> - 1) / VL<T> * VL<T>;
}

// Packs NV vectors of each row, the last one with `last` lanes. With Squares, adds the sums of squares to ssq.
template <class T, int NV, bool Squares, class S>
void pack_columns(const S* p, int64_t stride_n, int tokens, int last, T* out, int ld, T* ssq) {
  V<T> squares[NV] = {};
  for (int n = 0; n < tokens; ++n, p += stride_n, out += ld) {
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) {
      V<T> x = c < NV - 1 || last == VL<T> ? load(p + c * VL<T>) : load(p + c * VL<T>, last);
      store(out + c * VL<T>, x);
      if (Squares) squares[c] += x * x;
    }
  }
  if (!Squares) return;
#pragma GCC unroll 4
  for (int c = 0; c < NV; ++c) store(ssq + c * VL<T>, load(ssq + c * VL<T>) + squares[c]);
}

template <class T, bool Squares, class S>
void pack_rows(const S* p, int64_t stride_n, int tokens, int dim, T* out, int ld, T* ssq) {
  for (int c = 0; c < ld; c += 4 * VL<T>) {
    int vectors = (ld - c) / VL<T>, last = dim - c - (vectors - 1) * VL<T>;
    if (vectors > 4)
      pack_columns<T, 4, Squares>(p + c, stride_n, tokens, VL<T>, out + c, ld, ssq + c);
    else if (vectors == 4)
      pack_columns<T, 4, Squares>(p + c, stride_n, tokens, last, out + c, ld, ssq + c);
    else if (vectors == 3)
      pack_columns<T, 3, Squares>(p + c, stride_n, tokens, last, out + c, ld, ssq + c);
    else if (vectors == 2)
      pack_columns<T, 2, Squares>(p + c, stride_n, tokens, last, out + c, ld, ssq + c);
    else
      pack_columns<T, 1, Squares>(p + c, stride_n, tokens, last, out + c, ld, ssq + c);
  }
}

template <class T, class S>
void pack_strided(const S* p, int64_t stride_n, int64_t stride_d, int tokens, int dim, T* out, int ld) {
  for (int n = 0; n < tokens; ++n, out += ld) {
    for (int d = 0; d < dim; ++d) out[d] = widen(p[n * stride_n + d * stride_d]);
    for (int d = dim; d < ld; ++d) out[d] = 0;
  }
}

// For tokens with unit stride (stride_n == 1), as in a (batch, channels, height, width) feature map. Prefetches the
// next block, which follows in memory.
template <class T, class S>
void pack_transposed(const S* p, int64_t stride_d, int tokens, int dim, T* out, int ld) {
  for (int d = 0; d < ld; d += VL<T>)
    for (int n = 0; n < tokens; n += VL<T>) {
      int lanes = tokens - n < VL<T> ? tokens - n : VL<T>;
      V<T> x[VL<T>];
#pragma GCC unroll 16
      for (int i = 0; i < VL<T>; ++i) {
        const S* row = p + (d + i) * stride_d + n;
        if (d + i < dim) __builtin_prefetch(row + tokens, 0, 2);
        x[i] = d + i >= dim ? V<T>{} : lanes == VL<T> ? load(row) : load(row, lanes);
      }
      transpose_registers<T>(x);
      T* to = out + (ptrdiff_t)n * ld + d;
#pragma GCC unroll 16
      for (int i = 0; i < VL<T>; ++i)
        if (i < lanes) store(to + (ptrdiff_t)i * ld, x[i]);
    }
}

// The same with features as rows of the result, padded with zeros.
template <class T, class S>
void pack_features(const S* p, int64_t stride_d, int tokens, int dim, T* out, int ld) {
  for (int d = 0; d < dim; ++d, p += stride_d, out += ld)
    for (int n = 0; n < tokens; n += VL<T>) {
      __builtin_prefetch(p + n + tokens, 0, 2);
      store(out + n, tokens - n < VL<T> ? load(p + n, tokens - n) : load(p + n));
    }
}

// Row n of out holds the pair (token 2n, token 2n + 1) of each feature. An odd last token is paired with zero.
template <bool Squares>
void pack_pairs(const bf16* p, int64_t stride_n, int tokens, int dim, float* out, int ld, float* ssq) {
  constexpr int L = VL<float>;
  for (int c = 0; c < ld; c += L) {
    int lanes = dim - c < L ? dim - c : L;
    V<float> squares{};
    for (int n = 0; n < tokens; n += 2) {
      const bf16 *first = p + n * stride_n + c, *second = first + stride_n;
      VU32 pair = lanes == L ? bits(first) : bits(first, lanes);
      if (n + 1 < tokens) pair |= (lanes == L ? bits(second) : bits(second, lanes)) << 16;
      store(out + (ptrdiff_t)(n / 2) * ld + c, (V<float>)pair);
      if (!Squares) continue;
      squares += first_of_pair(pair) * first_of_pair(pair);
      squares += second_of_pair(pair) * second_of_pair(pair);
    }
    if (Squares) store(ssq + c, load(ssq + c) + squares);
  }
}

// Packs W by pairs of rows, in place: row i becomes the pairs (row 2i, row 2i + 1), rounded to bf16.
inline void pair_rows(float* w, int dim, int ld) {
  for (int i = 0; i < dim / 2; ++i)
    for (int c = 0; c < ld; c += VL<float>) {
      const float* row = w + (ptrdiff_t)(2 * i) * ld + c;
      VU32 pair = extend(narrow_lanes(load(row), bf16{})) | extend(narrow_lanes(load(row + ld), bf16{})) << 16;
      store(w + (ptrdiff_t)i * ld + c, (V<float>)pair);
    }
}

// (x - mean) / sqrt(variance + eps) for each row of `dim` columns; norms receives the reciprocals of the roots.
// x[0] is subtracted from the row first, so that a row of equal features becomes exactly 0, not rounding errors divided
// by sqrt(eps).
template <class T>
void layer_norm_rows(T* rows, T* norms, int tokens, int dim, int ld, T eps) {
  for (int n = 0; n < tokens; ++n, rows += ld) {
    V<T> sum = {}, squares = {}, first = broadcast(rows[0]);
    for (int c = dim; c < ld; ++c) rows[c] = rows[0];
    for (int c = 0; c < ld; c += VL<T>) {
      V<T> x = load(rows + c) - first;
      store(rows + c, x);
      sum += x;
    }
    V<T> mean = broadcast(sum_lanes<T>(sum) / T(dim));
    for (int c = 0; c < ld; c += VL<T>) store(rows + c, load(rows + c) - mean);
    for (int c = dim; c < ld; ++c) rows[c] = 0;
    for (int c = 0; c < ld; c += VL<T>) squares += load(rows + c) * load(rows + c);
    norms[n] = 1 / T(__builtin_sqrt(sum_lanes<T>(squares) / T(dim) + eps));
    V<T> inverse = broadcast(norms[n]);
    for (int c = 0; c < ld; c += VL<T>) store(rows + c, load(rows + c) * inverse);
  }
}

// Layer norm backward, in place on rows of gradients g: (g - mean(g) - r mean(g r)) / sqrt(variance + eps), where
// r = u + center are the normalised rows. `add` is added, if given.
template <class T>
void layer_norm_backward(T* rows, const T* u, const T* center, const T* norms, const T* add, ptrdiff_t ld_add,
                         int tokens, int dim, int ld) {
  for (int n = 0; n < tokens; ++n, rows += ld, u += ld) {
    V<T> sum = {}, dot = {};
    auto unit = [&](int c) { return center ? load(u + c) + load(center + c) : load(u + c); };
    for (int c = 0; c < ld; c += VL<T>) sum += load(rows + c), dot += load(rows + c) * unit(c);
    V<T> mean = broadcast(sum_lanes<T>(sum) / T(dim)), along = broadcast(sum_lanes<T>(dot) / T(dim));
    V<T> inverse = broadcast(norms[n]);
    for (int c = 0; c < ld; c += VL<T>) store(rows + c, (load(rows + c) - mean - along * unit(c)) * inverse);
    if (!add) continue;
    for (int c = 0; c < dim; c += VL<T>) {
      const T* from = add + n * ld_add + c;
      store(rows + c, load(rows + c) + (dim - c < VL<T> ? load(from, dim - c) : load(from)));
    }
  }
}

// Backward of x / max(|x|, eps), in place on rows of gradients g: (g - u <g, u>) / |x| with u the unit row, or g / eps
// where the norm is clamped.
template <class T>
void unit_rows_backward(T* rows, const T* unit, const T* norms, int tokens, int ld, T eps) {
  for (int n = 0; n < tokens; ++n, rows += ld, unit += ld) {
    V<T> dot = {};
    for (int c = 0; c < ld; c += VL<T>) dot += load(rows + c) * load(unit + c);
    V<T> along = broadcast(norms[n] <= eps ? T(0) : sum_lanes<T>(dot));
    V<T> inverse = broadcast(1 / (norms[n] < eps ? eps : norms[n]));
    for (int c = 0; c < ld; c += VL<T>) store(rows + c, (load(rows + c) - along * load(unit + c)) * inverse);
  }
}

// out[n] = sum_i a[n,i] b[n,i] for rows of ld columns; with stride_b = 0, all rows of a use the same row of b.
template <class T>
void row_dots(const T* a, const T* b, ptrdiff_t stride_b, int tokens, int ld, T* out) {
  for (int n = 0; n < tokens; n += VL<T>) {
    const int rows = tokens - n < VL<T> ? tokens - n : VL<T>;
    V<T> x[VL<T>];
#pragma GCC unroll 16
    for (int i = 0; i < VL<T>; ++i) {
      x[i] = V<T>{};
      if (i >= rows) continue;
      const T *p = a + (ptrdiff_t)(n + i) * ld, *q = b + (n + i) * stride_b;
      for (int c = 0; c < ld; c += VL<T>) x[i] += load(p + c) * load(q + c);
    }
    V<T> sums = sum_each<T>(x);
    if (rows == VL<T>)
      store(out + n, sums);
    else
      store(out + n, sums, rows);
  }
}

// Backward of out[n] = x[n] / d[n], d[n] = <u[n], z> + eps, with respect to u. rows g: the gradients with d taken as
// constant; they become g - z <g, u> / d, in place. The gradient of z is added to dz. along: scratch, one per token.
template <class T>
void quotient_backward(T* rows, const T* u, const T* z, const T* inverse, T* along, T* dz, int tokens, int ld) {
  row_dots(rows, u, ld, tokens, ld, along);
  for (int n = 0; n < tokens; ++n) along[n] *= -inverse[n];
  for (int c = 0; c < ld; c += VL<T>) {
    V<T> sum = {}, by = load(z + c);
    for (int n = 0; n < tokens; ++n) {
      V<T> a = broadcast(along[n]);
      T* p = rows + (ptrdiff_t)n * ld + c;
      store(p, load(p) + a * by);
      sum += a * load(u + (ptrdiff_t)n * ld + c);
    }
    store(dz + c, load(dz + c) + sum);
  }
}

// out[n] = sum_i a[i,n] b[i], for features as rows.
template <class T>
void column_dots(const T* a, const T* b, int dim, int ld, T* out) {
  for (int n = 0; n < ld; n += VL<T>) {
    V<T> sum = {};
    for (int i = 0; i < dim; ++i) sum += load(a + (ptrdiff_t)i * ld + n) * broadcast(b[i]);
    store(out + n, sum);
  }
}

// quotient_backward for features as rows.
template <class T>
void quotient_backward_by_rows(T* rows, const T* u, const T* z, const T* inverse, T* along, T* dz, int dim, int ld) {
  for (int n = 0; n < ld; n += VL<T>) {
    V<T> dot = {};
    for (int i = 0; i < dim; ++i) dot += load(rows + (ptrdiff_t)i * ld + n) * load(u + (ptrdiff_t)i * ld + n);
    store(along + n, -dot * load(inverse + n));
  }
  for (int i = 0; i < dim; ++i, rows += ld, u += ld) {
    V<T> sum = {}, by = broadcast(z[i]);
    for (int n = 0; n < ld; n += VL<T>) {
      store(rows + n, load(rows + n) + load(along + n) * by);
      sum += load(along + n) * load(u + n);
    }
    dz[i] += sum_lanes<T>(sum);
  }
}

// Writes token n, feature d of `rows` to y[d * stride_d + n].
template <class T, class S>
void unpack_transposed(const T* rows, int ld, int tokens, int dim, S* y, int64_t stride_d) {
  for (int d = 0; d < dim; d += VL<T>)
    for (int n = 0; n < tokens; n += VL<T>) {
      const int lanes = tokens - n < VL<T> ? tokens - n : VL<T>;
      V<T> x[VL<T>];
#pragma GCC unroll 16
      for (int i = 0; i < VL<T>; ++i) x[i] = i < lanes ? load(rows + (ptrdiff_t)(n + i) * ld + d) : V<T>{};
      transpose_registers<T>(x);
#pragma GCC unroll 16
      for (int i = 0; i < VL<T>; ++i) {
        if (d + i >= dim) continue;
        if (lanes == VL<T>)
          store(y + (d + i) * stride_d + n, x[i]);
        else
          store(y + (d + i) * stride_d + n, x[i], lanes);
      }
    }
}

template <class T, class S>
void unpack(const T* rows, int ld, int tokens, int dim, S* y, int64_t stride_n) {
  for (int n = 0; n < tokens; ++n, rows += ld, y += stride_n)
    for (int c = 0; c < dim; c += VL<T>) {
      if (c + VL<T> <= dim)
        store(y + c, load(rows + c));
      else
        store(y + c, load(rows + c), dim - c);
    }
}

}  // namespace XK_LEVEL
}  // namespace xk
