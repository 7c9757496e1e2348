// Feature maps of linear attention, on rows of `dim` columns padded with zeros to ld.
#pragma once

#include "vec.h"

namespace xk {
namespace XK_LEVEL {

// Replaces each vector x of every row by f(x, its offset from the first row). The columns from dim on stay 0.
template <class T, bool KEEPS_ZEROS, class F>
XK_INLINE void map_rows(T* rows, int tokens, int dim, int ld, F f) {
  for (int n = 0; n < tokens; ++n, rows += ld) {
    for (int c = 0; c < ld; c += VL<T>) store(rows + c, f(load(rows + c), (ptrdiff_t)n * ld + c));
    if (!KEEPS_ZEROS)
      for (int c = dim; c < ld; ++c) rows[c] = 0;
  }
}

template <class T>
void softmax_rows(T* rows, int tokens, int dim, int ld) {
  for (int n = 0; n < tokens; ++n, rows += ld) {
    for (int c = dim; c < ld; ++c) rows[c] = rows[0];
    V<T> highest = load(rows), total = {};
    for (int c = VL<T>; c < ld; c += VL<T>) highest = max<T>(highest, load(rows + c));
    const V<T> most = broadcast(max_lanes<T>(highest));
    for (int c = 0; c < ld; c += VL<T>) store(rows + c, exp_nonpositive(load(rows + c) - most));
    for (int c = dim; c < ld; ++c) rows[c] = 0;
    for (int c = 0; c < ld; c += VL<T>) total += load(rows + c);
    const V<T> inverse = broadcast(1 / sum_lanes<T>(total));
    for (int c = 0; c < ld; c += VL<T>) store(rows + c, load(rows + c) * inverse);
  }
}

// phi(x) in place. For a softmax over the tokens, exp(x) only: the maxima of the columns are already subtracted.
template <class T>
void apply_features(int features, T* rows, int tokens, int dim, int ld) {
  const V<T> none = {};
  switch (features) {
    case XK_RELU:
      return map_rows<T, true>(rows, tokens, dim, ld, [=](V<T> x, ptrdiff_t) { return max<T>(x, none); });
    case XK_ELU_PLUS_1:
      return map_rows<T, false>(rows, tokens, dim, ld, [=](V<T> x, ptrdiff_t) {
        return x > none ? x + T(1) : exp_nonpositive(x > none ? none : x);
      });
    case XK_SOFTMAX_TOKENS:
      return map_rows<T, false>(rows, tokens, dim, ld, [](V<T> x, ptrdiff_t) { return exp_nonpositive(x); });
    case XK_SOFTMAX_FEATURES:
      return softmax_rows(rows, tokens, dim, ld);
  }
}

// Turns rows g of gradients with respect to u = phi(x) into gradients with respect to x, in place. For a softmax over
// the tokens, g exp(x) only: its sums over tokens are not computed here.
template <class T>
void features_backward(int features, T* g, const T* u, int tokens, int dim, int ld) {
  const V<T> none = {}, one = broadcast(T(1));
  switch (features) {
    case XK_RELU:
      return map_rows<T, true>(g, tokens, dim, ld,
                               [=](V<T> x, ptrdiff_t at) { return load(u + at) <= none ? none : x; });
    case XK_ELU_PLUS_1:
      return map_rows<T, true>(g, tokens, dim, ld, [=](V<T> x, ptrdiff_t at) {
        V<T> phi = load(u + at);
        return phi <= one ? x * phi : x;
      });
    case XK_SOFTMAX_TOKENS:
      return map_rows<T, true>(g, tokens, dim, ld, [=](V<T> x, ptrdiff_t at) { return x * load(u + at); });
    case XK_SOFTMAX_FEATURES:
      for (int n = 0; n < tokens; ++n, g += ld, u += ld) {
        V<T> dot = {};
        for (int c = 0; c < ld; c += VL<T>) dot += load(g + c) * load(u + c);
        const V<T> mean = broadcast(sum_lanes<T>(dot));
        for (int c = 0; c < ld; c += VL<T>) store(g + c, (load(g + c) - mean) * load(u + c));
      }
  }
}

}  // namespace XK_LEVEL
}  // namespace xk
