// The maps of a layer in Gram form and their derivatives, one (batch, head) at a time. Formulas and names are those of
// xformer_kernels/layer/maps.py. D x C matrices are read in place; D x D matrices are copied to rows of ld =
// padded<T>(dim) columns, with zeros as padding, and combined in double.
#pragma once

#include "maps.h"
#include "plan.h"

namespace xk {
namespace XK_LEVEL {
namespace {

// As many elements as a vector of double has.
template <class T>
using Narrow = typename VectorOf<T, VL<double>* int(sizeof(T))>::unaligned;
template <class T>
XK_INLINE V<double> load_wide(const T* p) {
  return __builtin_convertvector(*(const Narrow<T>*)p, V<double>);
}
template <class T>
XK_INLINE void store_narrow(T* p, V<double> x) {
  *(Narrow<T>*)p = __builtin_convertvector(x, Narrow<T>);
}

template <class T>
T dot(const T* a, const T* b, int n) {
  V<T> first{}, second{};
  int i = 0;
  for (; i + 2 * VL<T> <= n; i += 2 * VL<T>) {
    first += load(a + i) * load(b + i);
    second += load(a + i + VL<T>) * load(b + i + VL<T>);
  }
  for (; i < n; i += VL<T>) {
    if (n - i < VL<T>)
      second += load(a + i, n - i) * load(b + i, n - i);
    else
      first += load(a + i) * load(b + i);
  }
  return sum_lanes<T>(first + second);
}

constexpr int64_t kMapsWork = 300'000;  // minimum multiply-adds of a product per thread

template <class T>
class LayerMaps {
 public:
  explicit LayerMaps(const xk_layer_maps_args& p)
      : p(p),
        D(int(p.dim)),
        C(int(p.features)),
        ld(padded<T>(D)),
        ldc(padded<T>(C)),
        key_value(p.map == XK_KEY_VALUE),
        softmax(p.activation == XK_SOFTMAX && !key_value),
        rows(key_value ? 3 : 2),
        left(key_value ? kKey : kQuery),
        right(key_value ? kValue : kKey),
        mixed(key_value ? kQuery : kValue),
        panels(ld / VL<T>, kMaxNR),
        threads(int(most(least(p.threads, p.batch * p.heads * D * D * C / kMapsWork), 1))),
        wide((size_t)threads * kWide * ld),
        own((size_t)threads * size()) {}

  int forward() {
    return run([&](const Scratch& t) { forward(t); });
  }
  int backward() {
    return run([&](const Scratch& t) { backward(t); });
  }

 private:
  enum { kQuery, kKey, kValue };
  static constexpr int kWide = 3, kMaps = 6, kVectors = 9;

  const xk_layer_maps_args& p;
  const int D, C, ld, ldc;
  const bool key_value, softmax;
  const int rows, left, right, mixed;  // those of Rule, in the order of the enum
  const Cut panels;
  const int threads;
  Buffer<double> wide;
  Buffer<T> own;

  // A head, and scratch of a thread that starts as zeros, but for `packed`. inverse: 1 / max(norm, eps) of q and k.
  // c, s: W c + bias and W s of q, k and v. scale: the factors of W_q and W_k in X. packed: an operand of products.
  struct Scratch {
    int64_t b, h;
    double *inverse[2], *columns;
    T *A, *E, *G, *turned, *cos, *keep, *c[3], *s[3], *scale[2], *de, *packed;
  };

  size_t size() const { return (size_t)(kMaps * D + kVectors) * ld + most((int64_t)C * ld, (int64_t)D * ldc); }

  template <class F>
  int run(F f) {
    if (!wide.data || !own.data) return XK_OUT_OF_MEMORY;
    parallel_for(p.batch * p.heads, threads, [&](int64_t bh, int thread) {
      Scratch t;
      t.b = bh / p.heads, t.h = bh % p.heads;
      double* numbers = wide.data + (ptrdiff_t)thread * kWide * ld;
      for (double** row : {&t.inverse[0], &t.inverse[1], &t.columns}) *row = numbers, numbers += ld;
      T* next = own.data + thread * size();
      zero(t.inverse[0], (size_t)kWide * ld);
      zero(next, (size_t)(kMaps * D + kVectors) * ld);
      for (T** map : {&t.A, &t.E, &t.G, &t.turned, &t.cos, &t.keep}) *map = next, next += (ptrdiff_t)D * ld;
      for (int i = 0; i < 3; ++i) t.c[i] = next, t.s[i] = next + ld, next += 2 * ld;
      for (T** vector : {&t.scale[0], &t.scale[1], &t.de}) *vector = next, next += ld;
      t.packed = next;
      f(t);
    });
    return XK_OK;
  }

  // Matrix or vector `i` of `count` of a head in an array of such, each of `size` numbers.
  T* at(const void* data, const Scratch& t, int64_t size, int count = 1, int i = 0) const {
    return (T*)data + ((t.b * count + i) * p.heads + t.h) * size;
  }
  const T* weight(const Scratch& t, int i) const { return (const T*)p.qkv + (i * p.heads + t.h) * D * C; }

  // y (D, columns) = x w, for x (D, K) and w of K rows.
  void multiply(const T* x, ptrdiff_t ldx, int K, const T* w, ptrdiff_t ldw, bool by_panels, T* y, ptrdiff_t ldy,
                int columns) const {
    Ahead none[2];
    MixTile<T> t{};
    t.ahead = none;
    t.x = x;
    t.x_row = ldx;
    t.x_k = 1;
    t.K = K;
    t.w = w;
    t.ldw = ldw;
    t.panel_rows = by_panels ? K : 0;
    t.y = y;
    t.ldy = ldy;
    t.dtype = kNative<T>;
    mix_block(t, D, columns);
  }
  // y (D, D) = a b^T, for D x C matrices a and b.
  void gram(const T* a, const T* b, T* y, const Scratch& t) const {
    for (int i = 0; i < panels.parts; ++i) pack_panel(b, C, 1, C, D, panels, i, t.packed);
    multiply(a, C, C, t.packed, 0, true, y, ld, D);
  }
  // y (D, C) = map b, for a D x D map and a D x C matrix b, whose rows are copied if they end within a vector.
  void mix(const T* map, const T* b, T* y, const Scratch& t) const {
    for (int i = 0; i < D && ldc > C; ++i) {
      memcpy(t.packed + (ptrdiff_t)i * ldc, b + (ptrdiff_t)i * C, C * sizeof(T));
      zero(t.packed + (ptrdiff_t)i * ldc + C, ldc - C);
    }
    multiply(map, ld, D, ldc > C ? t.packed : b, ldc, false, y, C, C);
  }
  // y[i] = sum_j map[i, j] x[j]
  void apply(const T* map, const T* x, T* y) const {
    for (int i = 0; i < D; ++i) y[i] = dot(map + (ptrdiff_t)i * ld, x, D);
  }

  void project(const Scratch& t) const {
    const T *s = (const T*)p.s + t.b * C, *c = (const T*)p.c + t.b * C;
    for (int i = 0; i < 3; ++i) {
      const T *w = weight(t, i), *bias = (const T*)p.qkv_bias + (i * p.heads + t.h) * D;
      for (int r = 0; r < D; ++r, w += C) {
        t.c[i][r] = bias[r] + dot(w, c, C);
        t.s[i][r] = dot(w, s, C);
      }
    }
  }
  void copy_map(const void* data, const Scratch& t, T* map) const {
    const T* from = at(data, t, (int64_t)D * D);
    for (int i = 0; i < D; ++i) memcpy(map + (ptrdiff_t)i * ld, from + (ptrdiff_t)i * D, D * sizeof(T));
  }
  double inverse(double norm) const { return !p.normalised ? norm : 1 / (norm < p.eps ? p.eps : norm); }

  // A, and E or, for key_value, E^T, from cos and keep.
  void activate(const Scratch& t) const {
    const T temperature = ((const T*)p.temperature)[t.h];
    for (int i = 0; i < D; ++i) {
      const ptrdiff_t row = (ptrdiff_t)i * ld;
      V<T> highest = broadcast(-T(__builtin_inf())), total{};
      for (int j = 0; j < ld; j += VL<T>) {
        const V<T> x = temperature * load(t.cos + row + j);
        store(t.A + row + j, x);
        if (softmax && j + VL<T> <= D) highest = max<T>(highest, x);
      }
      if (softmax) {
        T top = max_lanes<T>(highest);
        for (int j = D / VL<T> * VL<T>; j < D; ++j) top = t.A[row + j] > top ? t.A[row + j] : top;
        for (int j = 0; j < D; j += VL<T>) store(t.A + row + j, exp_nonpositive(load(t.A + row + j) - top));
        for (int j = D; j < ld; ++j) t.A[row + j] = 0;
        for (int j = 0; j < D; j += VL<T>) total += load(t.A + row + j);
        const T by = 1 / sum_lanes<T>(total);
        for (int j = 0; j < D; j += VL<T>) store(t.A + row + j, load(t.A + row + j) * by);
      }
      const V<T> by = broadcast(key_value ? T(t.inverse[kQuery][i]) : T(1));
      for (int j = 0; j < D; j += VL<T>) {
        V<T> x = load(t.A + row + j) * by;
        if (p.keep) x *= load(t.keep + row + j);
        store(t.E + row + j, x);
      }
    }
  }

  void forward(const Scratch& t) const {
    project(t);
    if (p.keep) copy_map(p.keep, t, t.keep);
    const double n = ((const T*)p.n)[t.b];
    auto P = [&](int i) { return at(p.P, t, (int64_t)D * C, rows, i); };
    for (int i = kQuery; i <= kKey; ++i) {
      T* norms = at(p.norms, t, D, 2, i);
      for (int r = 0; r < D; ++r) {
        const double c = t.c[i][r], s = t.s[i][r], ws = n * c + 2 * s;
        const double square = dot(weight(t, i) + (ptrdiff_t)r * C, P(i) + (ptrdiff_t)r * C, C) + c * ws;
        const double norm = p.normalised ? __builtin_sqrt(square < 0 ? 0 : square) : 1;
        norms[r] = T(norm);
        t.inverse[i][r] = inverse(norm);
      }
    }
    gram(weight(t, left), P(right), t.G, t);
    T* saved = at(p.cos, t, (int64_t)D * D);
    for (int i = 0; i < D; ++i) {
      const ptrdiff_t row = (ptrdiff_t)i * ld;
      const double c = t.c[left][i], s = t.s[left][i], by = t.inverse[left][i];
      for (int j = 0; j < D; j += VL<double>) {
        const V<double> c_j = load_wide(t.c[right] + j), s_j = load_wide(t.s[right] + j);
        V<double> x = (load_wide(t.G + row + j) + s * c_j + c * (s_j + n * c_j)) * by;
        if (!key_value) x *= load(t.inverse[kKey] + j);
        store_narrow(t.cos + row + j, x);
      }
      memcpy(saved + (ptrdiff_t)i * D, t.cos + row, D * sizeof(T));
    }
    activate(t);
    if (key_value) transpose(t.E, t.turned, D, ld);
    const T* E = key_value ? t.turned : t.E;
    apply(E, t.c[mixed], at(p.e, t, D));
    mix(E, weight(t, mixed), at(p.T, t, (int64_t)D * C), t);
  }

  void backward(const Scratch& t) const {
    project(t);
    if (p.keep) copy_map(p.keep, t, t.keep);
    copy_map(p.cos, t, t.cos);
    const T* norms[2] = {at(p.norms, t, D, 2, kQuery), at(p.norms, t, D, 2, kKey)};
    for (int i = kQuery; i <= kKey; ++i)
      for (int r = 0; r < D; ++r) t.inverse[i][r] = inverse(norms[i][r]);
    activate(t);
    transpose(t.E, t.turned, D, ld);
    const T *E = key_value ? t.turned : t.E, *E_turned = key_value ? t.E : t.turned;
    const T *dT = at(p.dT, t, (int64_t)D * C), *de = at(p.de, t, D), *z = weight(t, mixed);
    T* dshifted[3];
    for (int i = 0; i < 3; ++i) dshifted[i] = at(p.dshifted, t, D, 3, i);
    apply(E, t.c[mixed], at(p.e, t, D));
    apply(E_turned, de, dshifted[mixed]);
    mix(E, z, at(p.T, t, (int64_t)D * C), t);
    mix(E_turned, dT, at(p.dz, t, (int64_t)D * C), t);

    memcpy(t.de, de, D * sizeof(T));
    gram(key_value ? z : dT, key_value ? dT : z, t.G, t);
    gradient_of_gram(t, norms, key_value ? t.c[mixed] : t.de, key_value ? t.de : t.c[mixed]);
    gradients_of_rows(t, dshifted);
  }

  // G: the gradient of the map, to which `of_row of_column^T` is added; replaced by dG. Writes scale.
  void gradient_of_gram(const Scratch& t, const T* const (&norms)[2], const T* of_row, const T* of_column) const {
    const double temperature = ((const T*)p.temperature)[t.h];
    double dtemperature = 0;
    for (int i = 0; i < D; ++i) {
      const ptrdiff_t row = (ptrdiff_t)i * ld;
      const double from_row = of_row[i];
      auto gradient = [&](int j) {
        V<double> d = load_wide(t.G + row + j) + from_row * load_wide(of_column + j);
        return p.keep ? d * load_wide(t.keep + row + j) : d;
      };
      // Rows of A, which are rounded to T, do not sum to exactly 1: a large common part of the gradient would remain.
      double mean = 0;
      if (softmax) {
        V<double> sum{}, weights{};
        for (int j = 0; j < D; j += VL<double>) {
          const V<double> A = load_wide(t.A + row + j);
          sum += A * gradient(j);
          weights += A;
        }
        mean = sum_lanes<double>(sum) / sum_lanes<double>(weights);
      }
      const double by = (key_value ? t.inverse[kQuery][i] : 1) * temperature;
      V<double> along{};
      for (int j = 0; j < D; j += VL<double>) {
        V<double> d = gradient(j);
        if (softmax) d = load_wide(t.A + row + j) * (d - mean);
        const V<double> product = d * load_wide(t.cos + row + j);
        along += product;
        store(t.columns + j, load(t.columns + j) + product);
        d *= by * t.inverse[left][i];
        if (!key_value) d *= load(t.inverse[kKey] + j);
        store_narrow(t.G + row + j, d);
      }
      const double total = sum_lanes<double>(along) * by;
      dtemperature += sum_lanes<double>(along) * (key_value ? t.inverse[kQuery][i] : 1);
      t.scale[kQuery][i] = norm_term(total, norms[kQuery][i], t.inverse[kQuery][i]);
      if (key_value) t.scale[kKey][i] = norm_term(total, norms[kKey][i], t.inverse[kKey][i]);
    }
    for (int j = 0; j < D && !key_value; ++j)
      t.scale[kKey][j] = norm_term(t.columns[j] * temperature, norms[kKey][j], t.inverse[kKey][j]);
    p.dtemperature[t.b * p.heads + t.h] = dtemperature;
  }
  T norm_term(double along, double norm, double inverse) const {
    return !p.normalised || norm <= p.eps ? T(0) : T(-along * inverse * inverse);
  }

  // X = scale W + dG W', x = scale c + dG c' and X s = scale (W s) + dG (W' s), where W' is that of the other factor.
  void gradients_of_rows(const Scratch& t, T* const (&dshifted)[3]) const {
    transpose(t.G, t.turned, D, ld);
    const T n = ((const T*)p.n)[t.b];
    for (int i = 0; i < rows; ++i) {
      T *X = at(p.X, t, (int64_t)D * C, rows, i), *x = at(p.x, t, D, rows, i);
      const bool of_map = i == left || i == right;
      const T *d = i == left ? t.G : t.turned, *w = weight(t, i);
      const int other = i == left ? right : left;
      if (of_map) mix(d, weight(t, other), X, t);
      const bool scaled = i < kValue && p.normalised;  // otherwise infinite weights would become NaN
      for (int r = 0; r < D; ++r, X += C, w += C) {
        T of_c = 0, of_s = i == mixed ? dshifted[i][r] : T(0);
        if (of_map) {
          of_c = dot(d + (ptrdiff_t)r * ld, t.c[other], D);
          of_s += dot(d + (ptrdiff_t)r * ld, t.s[other], D);
        } else {
          zero(X, C);
        }
        if (scaled) {
          const T scale = t.scale[i][r];
          of_c += scale * t.c[i][r];
          of_s += scale * t.s[i][r];
          for (int k = 0; k < C; ++k) X[k] += scale * w[k];
        }
        x[r] = of_c;
        dshifted[i][r] = of_s + n * of_c;
      }
    }
  }
};

}  // namespace
}  // namespace XK_LEVEL
}  // namespace xk
