// The functions of the C API as plain loops in double.
#pragma once

#include "tensors.h"

// Calls f(batch, head) for all batches and heads.
template <class F>
void heads(const Array& x, F f) {
  for (int64_t b = 0; b < x.B; ++b)
    for (int64_t h = 0; h < x.H; ++h) f(b, h);
}
// Calls f(i, j) for all i < I, j < J.
template <class F>
void pairs_of(int64_t I, int64_t J, F f) {
  for (int64_t i = 0; i < I; ++i)
    for (int64_t j = 0; j < J; ++j) f(i, j);
}

// sum_n a[n,i] b[n,j]
inline Array gram_of(const Array& a, const Array& b) {
  Array g(a.B, a.H, a.D, b.D);
  heads(a, [&](auto B, auto H) {
    for (int64_t n = 0; n < a.N; ++n)
      pairs_of(a.D, b.D, [&](auto i, auto j) { g(B, H, i, j) += a(B, H, n, i) * b(B, H, n, j); });
  });
  return g;
}
// sum_i x[n,i] w[i,o]
inline Array product(const Array& x, const Array& w) {
  Array y(x.B, x.H, x.N, w.D);
  heads(x, [&](auto B, auto H) {
    for (int64_t n = 0; n < x.N; ++n)
      pairs_of(x.D, w.D, [&](auto i, auto o) { y(B, H, n, o) += x(B, H, n, i) * w(B, H, i, o); });
  });
  return y;
}
inline Array transposed(const Array& x) {
  Array y(x.B, x.H, x.D, x.N);
  heads(x, [&](auto B, auto H) { pairs_of(x.N, x.D, [&](auto n, auto d) { y(B, H, d, n) = x(B, H, n, d); }); });
  return y;
}
// Elementwise f(x, y); y may be x.
template <class F>
Array each(const Array& x, const Array& y, F f) {
  Array z = x;
  for (size_t i = 0; i < z.data.size(); ++i) z.data[i] = f(x.data[i], y.data[i]);
  return z;
}
inline Array plus(const Array& x, const Array& y) {
  return each(x, y, [](double a, double b) { return a + b; });
}
inline Array times(const Array& x, double by) {
  return each(x, x, [=](double a, double) { return a * by; });
}
// Sums of x^power over the tokens, as one row.
inline Array sums_of(const Array& x, int power) {
  Array s(x.B, x.H, 1, x.D);
  heads(x, [&](auto B, auto H) {
    pairs_of(x.N, x.D, [&](auto n, auto d) { s(B, H, 0, d) += std::pow(x(B, H, n, d), power); });
  });
  return s;
}

// Calls f(length, get, set) for each row (by_rows) or column of x: get(array, i) and set(array, i) are element i of
// that row or column of an array of the same shape.
template <class F>
void lines(const Array& x, bool by_rows, F f) {
  heads(x, [&](auto B, auto H) {
    for (int64_t line = 0; line < (by_rows ? x.N : x.D); ++line)
      f(
          by_rows ? x.D : x.N,
          [=](const Array& of, int64_t i) -> double { return by_rows ? of(B, H, line, i) : of(B, H, i, line); },
          [=](Array& of, int64_t i) -> double& { return by_rows ? of(B, H, line, i) : of(B, H, i, line); });
  });
}
// u = x / max(|x|, eps), and the gradient with respect to x, given the gradient g with respect to u.
inline Array unit(const Array& x, int norm, double eps) {
  Array u = x;
  if (norm == XK_NO_NORM) return u;
  lines(x, norm == XK_FEATURE_NORM, [&](int64_t size, auto get, auto ref) {
    double squares = 0;
    for (int64_t i = 0; i < size; ++i) squares += get(x, i) * get(x, i);
    for (int64_t i = 0; i < size; ++i) ref(u, i) = get(x, i) / std::max(std::sqrt(squares), eps);
  });
  return u;
}
inline Array unit_backward(const Array& x, const Array& g, int norm, double eps) {
  Array dx = g;
  if (norm == XK_NO_NORM) return dx;
  lines(x, norm == XK_FEATURE_NORM, [&](int64_t size, auto get, auto ref) {
    double squares = 0, along = 0;
    for (int64_t i = 0; i < size; ++i) squares += get(x, i) * get(x, i), along += get(x, i) * get(g, i);
    const double length = std::sqrt(squares);
    for (int64_t i = 0; i < size; ++i)
      ref(dx, i) = length > eps ? get(g, i) / length - get(x, i) * along / (length * squares) : get(g, i) / eps;
  });
  return dx;
}
// Softmax and its derivative.
inline Array softmax(const Array& x, bool by_rows) {
  Array y = x;
  lines(x, by_rows, [&](int64_t size, auto get, auto ref) {
    double highest = -INFINITY, total = 0;
    for (int64_t i = 0; i < size; ++i) highest = std::max(highest, get(x, i));
    for (int64_t i = 0; i < size; ++i) total += std::exp(get(x, i) - highest);
    for (int64_t i = 0; i < size; ++i) ref(y, i) = total > 0 ? std::exp(get(x, i) - highest) / total : 0;
  });
  return y;
}
inline Array softmax_backward(const Array& y, const Array& g, bool by_rows) {
  Array dx = g;
  lines(y, by_rows, [&](int64_t size, auto get, auto ref) {
    double along = 0;
    for (int64_t i = 0; i < size; ++i) along += get(y, i) * get(g, i);
    for (int64_t i = 0; i < size; ++i) ref(dx, i) = get(y, i) * (get(g, i) - along);
  });
  return dx;
}
// (x - mean) / sqrt(variance + eps) of each row, and its derivative.
inline Array layer_norm(const Array& x, double eps) {
  Array y = x;
  lines(x, true, [&](int64_t size, auto get, auto ref) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < size; ++i) mean += get(x, i) / double(size);
    for (int64_t i = 0; i < size; ++i) variance += (get(x, i) - mean) * (get(x, i) - mean) / double(size);
    for (int64_t i = 0; i < size; ++i) ref(y, i) = (get(x, i) - mean) / std::sqrt(variance + eps);
  });
  return y;
}
inline Array layer_norm_backward(const Array& x, const Array& g, double eps) {
  Array dx = g;
  const Array y = layer_norm(x, eps);
  lines(x, true, [&](int64_t size, auto get, auto ref) {
    double mean = 0, variance = 0, mean_g = 0, along = 0;
    for (int64_t i = 0; i < size; ++i) mean += get(x, i) / double(size), mean_g += get(g, i) / double(size);
    for (int64_t i = 0; i < size; ++i) variance += (get(x, i) - mean) * (get(x, i) - mean) / double(size);
    for (int64_t i = 0; i < size; ++i) along += get(g, i) * get(y, i) / double(size);
    for (int64_t i = 0; i < size; ++i)
      ref(dx, i) = (get(g, i) - mean_g - get(y, i) * along) / std::sqrt(variance + eps);
  });
  return dx;
}

// A feature map of linear attention, and its derivative.
inline Array features(const Array& x, int map, const Mask& mask) {
  if (map == XK_SOFTMAX_FEATURES) return mask.applied(softmax(x, true));
  if (map == XK_SOFTMAX_TOKENS) {
    Array left_out = x;
    heads(x, [&](auto B, auto H) {
      pairs_of(x.N, x.D, [&](auto n, auto d) {
        if (!mask(B, n)) left_out(B, H, n, d) = -INFINITY;
      });
    });
    return mask.applied(softmax(left_out, false));
  }
  return mask.applied(each(x, x, [=](double a, double) {
    return map == XK_RELU ? std::max(a, 0.) : map == XK_ELU_PLUS_1 ? (a > 0 ? a + 1 : std::exp(a)) : a;
  }));
}
inline Array features_backward(const Array& x, const Array& phi, const Array& g, int map, const Mask& mask) {
  if (map == XK_SOFTMAX_FEATURES) return mask.applied(softmax_backward(phi, g, true));
  if (map == XK_SOFTMAX_TOKENS) return mask.applied(softmax_backward(phi, g, false));
  return mask.applied(each(x, g, [=](double a, double b) {
    return map == XK_RELU ? (a > 0 ? b : 0) : map == XK_ELU_PLUS_1 ? (a > 0 ? b : b * std::exp(a)) : b;
  }));
}

struct Attention {
  Array out, dq, dk, dv, dt;
};

inline Attention xfa(const Array& q, const Array& k, const Array& v, const Array& t, const Array& dout, int map,
                     int norm, bool of_softmax, double eps) {
  const Array qn = unit(q, norm, eps), kn = unit(k, norm, eps);
  const bool key_value = map == XK_KEY_VALUE;
  auto scaled = [&](Array x) {
    heads(x, [&](auto B, auto H) { pairs_of(x.N, x.D, [&](auto i, auto j) { x(B, H, i, j) *= t(0, 0, 0, H); }); });
    return x;
  };
  const Array raw = key_value ? gram_of(kn, v) : gram_of(qn, kn), S = scaled(raw);
  const Array A = of_softmax && !key_value ? softmax(S, true) : S;
  Attention r;
  Array dS, dqn, dkn;
  if (key_value) {
    r.out = product(qn, A);
    dS = gram_of(qn, dout);
    dqn = product(dout, transposed(A));
    dkn = scaled(product(v, transposed(dS)));
    r.dv = scaled(product(kn, dS));
  } else {
    r.out = product(v, transposed(A));
    r.dv = product(dout, A);
    dS = gram_of(dout, v);
    if (of_softmax) dS = softmax_backward(A, dS, true);
    dqn = scaled(product(kn, transposed(dS)));
    dkn = scaled(product(qn, dS));
  }
  r.dt = Array(1, 1, 1, q.H);
  heads(S, [&](auto B, auto H) {
    pairs_of(S.N, S.D, [&](auto i, auto j) { r.dt(0, 0, 0, H) += dS(B, H, i, j) * raw(B, H, i, j); });
  });
  r.dq = unit_backward(q, dqn, norm, eps);
  r.dk = unit_backward(k, dkn, norm, eps);
  return r;
}

inline Attention linear_attention(const Array& q, const Array& k, const Array& v, const Array& dout, int features_q,
                                  int features_k, bool normalize, double scale, double eps, const Mask& queries,
                                  const Mask& tokens) {
  const Array fq = features(q, features_q, queries), fk = features(k, features_k, tokens);
  const Array S = gram_of(fk, v), z = sums_of(fk, 1), sums = product(fq, S);
  Array inverse(q.B, q.H, q.N, 1), g = dout, dz(q.B, q.H, 1, q.D);
  Attention r;
  r.out = sums;
  Array dfq;
  auto divide = [&](Array& x) {
    heads(x,
          [&](auto B, auto H) { pairs_of(x.N, x.D, [&](auto n, auto d) { x(B, H, n, d) *= inverse(B, H, n, 0); }); });
  };
  heads(q, [&](auto B, auto H) {
    for (int64_t n = 0; n < q.N; ++n) {
      double d = normalize ? eps : 1;
      for (int64_t i = 0; i < q.D && normalize; ++i) d += fq(B, H, n, i) * z(B, H, 0, i);
      inverse(B, H, n, 0) = scale / d;
    }
  });
  divide(r.out), divide(g);
  dfq = product(g, transposed(S));
  heads(q, [&](auto B, auto H) {
    for (int64_t n = 0; n < q.N && normalize; ++n) {
      double along = 0;  // out dout / d
      for (int64_t j = 0; j < v.D; ++j) along += g(B, H, n, j) * r.out(B, H, n, j) / scale;
      for (int64_t i = 0; i < q.D; ++i) {
        dfq(B, H, n, i) -= along * z(B, H, 0, i);
        dz(B, H, 0, i) -= along * fq(B, H, n, i);
      }
    }
  });
  const Array dS = gram_of(fq, g);
  Array dfk = product(v, transposed(dS));
  heads(k, [&](auto B, auto H) { pairs_of(k.N, k.D, [&](auto n, auto i) { dfk(B, H, n, i) += dz(B, H, 0, i); }); });
  r.out = queries.applied(r.out);
  r.dv = tokens.applied(product(fk, dS));
  r.dq = features_backward(q, fq, dfq, features_q, queries);
  r.dk = features_backward(k, fk, dfk, features_k, tokens);
  return r;
}
