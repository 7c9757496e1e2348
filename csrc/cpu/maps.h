// The D x D algebra between the passes, for one (batch, head) at a time. Matrices have `dim` rows of ld =
// padded<T>(dim) columns.
//
// query_key stores its map with key features j as rows and query features i as columns, X[j,i] = cos(q_i, k_j) with
// token norm: the softmax over key features is then over rows, lane by lane, and A^T is the operand of the mix.
// key_value stores X[i,j] = sum_n k[n,i] v[n,j] / |k_i|, with key features as rows.
// Only X and the norms are saved; A is recomputed in the backward.
#pragma once

#include "pass.h"

namespace xk {
namespace XK_LEVEL {

template <class T>
struct Head {
  int dim, ld;
  bool key_value, token_norm, softmax;
  T eps, temperature;
  T* stats;  // X (dim x dim, no padding), |q_i|, |k_j|

  T* norm_q() const { return stats + (ptrdiff_t)dim * dim; }
  T* norm_k() const { return norm_q() + dim; }
  T clamped(T norm) const { return norm < eps ? eps : norm; }
  // 1 / max(norm, eps) for token norm, otherwise 1.
  void inverse_norms(const T* norms, T* inverse) const {
    for (int i = 0; i < ld; ++i) inverse[i] = token_norm && i < dim ? 1 / clamped(norms[i]) : T(1);
  }
  int lanes(int column) const { return dim - column < VL<T> ? dim - column : VL<T>; }
};

// out[i, j] = in[j, i]; both dim x ld.
template <class T>
void transpose(const T* in, T* out, int dim, int ld) {
  for (int r = 0; r < dim; r += VL<T>)
    for (int c = 0; c < ld; c += VL<T>) {
      V<T> x[VL<T>];
      int rows = dim - r < VL<T> ? dim - r : VL<T>, cols = dim - c < VL<T> ? dim - c : VL<T>;
      for (int i = 0; i < VL<T>; ++i) x[i] = i < rows ? load(in + (ptrdiff_t)(r + i) * ld + c) : V<T>{};
      transpose_registers<T>(x);
      for (int i = 0; i < cols; ++i) store(out + (ptrdiff_t)(c + i) * ld + r, x[i]);
    }
}

// Computes W from X, in place: A^T[j,i] = softmax_j(t X[j,i]) or t X[j,i] for query_key; t X[i,j] / |q_i| for
// key_value.
template <class T>
void apply_map(const Head<T>& head, T* x, T* inverse_q) {
  int dim = head.dim, ld = head.ld;
  if (head.key_value) {
    head.inverse_norms(head.norm_q(), inverse_q);
    for (int i = 0; i < dim; ++i)
      for (int c = 0; c < ld; c += VL<T>) {
        T* p = x + (ptrdiff_t)i * ld + c;
        store(p, load(p) * (head.temperature * inverse_q[i]));
      }
    return;
  }
  V<T> t = broadcast(head.temperature);
  for (int c = 0; c < ld; c += VL<T>) {
    V<T> highest = broadcast(-T(__builtin_inf()));
    T* p = x + c;
    for (int j = 0; j < dim; ++j, p += ld) {
      V<T> s = t * load(p);
      store(p, s);
      highest = max<T>(highest, s);
    }
    if (!head.softmax) continue;
    V<T> total = {};
    p = x + c;
    for (int j = 0; j < dim; ++j, p += ld) {
      V<T> e = exp_nonpositive(load(p) - highest);
      store(p, e);
      total += e;
    }
    V<T> inverse = T(1) / total;
    p = x + c;
    for (int j = 0; j < dim; ++j, p += ld) store(p, load(p) * inverse);
  }
}

// Computes the saved statistics of a head from its Gram matrix and sums of squares, and turns the Gram matrix into W,
// in place. inverse_q: scratch of ld.
template <class T>
void forward_map(const Head<T>& head, T* g, const T* ssq_q, const T* ssq_k, T* inverse_q) {
  int dim = head.dim, ld = head.ld;
  for (int i = 0; i < dim; ++i) {
    head.norm_q()[i] = head.token_norm ? T(__builtin_sqrt(ssq_q[i])) : T(0);
    head.norm_k()[i] = head.token_norm ? T(__builtin_sqrt(ssq_k[i])) : T(0);
  }
  head.inverse_norms(head.norm_q(), inverse_q);
  for (int j = 0; j < dim; ++j) {
    V<T> inverse_k = broadcast(head.token_norm ? 1 / head.clamped(head.norm_k()[j]) : T(1));
    for (int c = 0; c < ld; c += VL<T>) {
      T* p = g + (ptrdiff_t)j * ld + c;
      V<T> x = load(p) * inverse_k;
      if (!head.key_value) x *= load(inverse_q + c);
      store(p, x);
      store(head.stats + (ptrdiff_t)j * dim + c, x, head.lanes(c));
    }
  }
  apply_map(head, g, inverse_q);
}

// Recomputes the W of the forward from the statistics.
template <class T>
void saved_map(const Head<T>& head, T* w, T* inverse_q) {
  for (int j = 0; j < head.dim; ++j)
    for (int c = 0; c < head.ld; c += VL<T>)
      store(w + (ptrdiff_t)j * head.ld + c, load(head.stats + (ptrdiff_t)j * head.dim + c, head.lanes(c)));
  apply_map(head, w, inverse_q);
}

// The multiple of q (or k) that the second pass of the backward adds to dq (dk): the derivative through 1 / |q_i|,
// which is -along / |q_i|^2 where the norm is above eps (F.normalize counts a norm equal to eps as clamped).
template <class T>
T norm_term(const Head<T>& head, T along, T norm) {
  return !head.token_norm || norm <= head.eps ? T(0) : -along / (norm * norm);
}

// The sum of the lanes, in double: in the gradient of the temperature, terms of opposite sign may cancel. Each lane
// sums few terms (kTermsOfLane in backward_query_key), so that rounding errors do not grow with the size of the map.
constexpr int kTermsOfLane = 8;
template <class T>
XK_INLINE double wide_sum(V<T> x) {
  double total = 0;
#pragma GCC unroll 16
  for (int i = 0; i < VL<T>; ++i) total += double(x[i]);
  return total;
}

// query_key. d: dA^T in, dG^T out; a: A^T in, dG out. scale_q, scale_k: the norm terms, ld numbers each, with zeros as
// padding. Returns the gradient of the temperature.
template <class T>
double backward_query_key(const Head<T>& head, T* d, T* a, T* scale_q, T* scale_k) {
  int dim = head.dim, ld = head.ld;
  double dt = 0;
  V<T> t = broadcast(head.temperature);
  alignas(kVectorBytes) T inverse[VL<T>];
  for (int j = 0; j < ld; ++j) scale_k[j] = 0;
  for (int c = 0; c < ld; c += VL<T>) {
    int lanes = head.lanes(c);
    V<T> mean = {}, along_q = {}, dt_lanes = {};
    if (head.softmax)
      for (int j = 0; j < dim; ++j) mean += load(a + (ptrdiff_t)j * ld + c) * load(d + (ptrdiff_t)j * ld + c);
    for (int i = 0; i < VL<T>; ++i)
      inverse[i] = head.token_norm && i < lanes ? 1 / head.clamped(head.norm_q()[c + i]) : T(1);
    V<T> inverse_q = load(inverse);
    for (int j = 0; j < dim; ++j) {
      T* p = d + (ptrdiff_t)j * ld + c;
      V<T> ds = load(p), x = load(head.stats + (ptrdiff_t)j * dim + c, lanes);
      if (head.softmax) ds = load(a + (ptrdiff_t)j * ld + c) * (ds - mean);
      if (lanes < VL<T>) {
        store(inverse, ds);
        ds = load(inverse, lanes);
      }
      dt_lanes += ds * x;
      if ((j + 1) % kTermsOfLane == 0) {
        dt += wide_sum<T>(dt_lanes);
        dt_lanes = V<T>{};
      }
      V<T> dx = t * ds, along = dx * x;
      along_q += along;
      scale_k[j] += sum_lanes<T>(along);
      V<T> dg = dx * inverse_q;
      if (head.token_norm) dg *= 1 / head.clamped(head.norm_k()[j]);
      store(p, dg);
    }
    dt += wide_sum<T>(dt_lanes);
    store(scale_q + c, along_q);
  }
  for (int i = 0; i < dim; ++i) {
    scale_q[i] = norm_term(head, scale_q[i], head.norm_q()[i]);
    scale_k[i] = norm_term(head, scale_k[i], head.norm_k()[i]);
  }
  transpose(d, a, dim, ld);
  return dt;
}

// key_value. d: dW in, dG out; w: W in, dG^T out; w_t: W^T out. Otherwise as backward_query_key.
template <class T>
double backward_key_value(const Head<T>& head, T* d, T* w, T* w_t, T* scale_q, T* scale_k) {
  int dim = head.dim, ld = head.ld;
  transpose(w, w_t, dim, ld);
  double dt = 0;
  for (int i = 0; i < ld; ++i) scale_q[i] = scale_k[i] = 0;
  for (int i = 0; i < dim; ++i) {
    T inverse_q = head.token_norm ? 1 / head.clamped(head.norm_q()[i]) : T(1);
    T inverse_k = head.token_norm ? 1 / head.clamped(head.norm_k()[i]) : T(1);
    V<T> along_q = {}, along_k = {};
    for (int c = 0; c < ld; c += VL<T>) {
      T* p = d + (ptrdiff_t)i * ld + c;
      V<T> dw = load(p), x = load(head.stats + (ptrdiff_t)i * dim + c, head.lanes(c));
      along_q += dw * load(w + (ptrdiff_t)i * ld + c);
      V<T> dm = dw * inverse_q;
      along_k += dm * x;
      store(p, dm * (head.temperature * inverse_k));
    }
    const double dt_row = wide_sum<T>(along_k);
    dt += dt_row;
    scale_q[i] = norm_term(head, sum_lanes<T>(along_q), head.norm_q()[i]);
    scale_k[i] = norm_term(head, T(head.temperature * dt_row), head.norm_k()[i]);
  }
  transpose(d, w, dim, ld);
  return dt;
}

}  // namespace XK_LEVEL
}  // namespace xk
