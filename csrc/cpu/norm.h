// Batch norm with running statistics as a scale and a shift, and hard-swish.
#pragma once

#include "plan.h"

namespace xk {
namespace XK_LEVEL {
namespace {

// batch_norm(z + bias) = scale z + shift, padded with zeros to whole vectors; without batch norm scale is 1.
inline void scale_and_shift(const xk_batch_norm& norm, const float* bias, int dim, float* scale, float* shift) {
  for (int c = 0; c < dim; c += VL<float>) {
    const int lanes = dim - c < VL<float> ? dim - c : VL<float>;
    auto part = [&](const float* p) { return lanes < VL<float> ? load(p + c, lanes) : load(p + c); };
    V<float> by = broadcast(1.f), plus = bias ? part(bias) : V<float>{};
    if (norm.variance) {
      by = (norm.weight ? part(norm.weight) : by) / sqrt<float>(part(norm.variance) + float(norm.eps));
      plus = (plus - part(norm.mean)) * by + (norm.bias ? part(norm.bias) : V<float>{});
    }
    store(scale + c, by);
    store(shift + c, plus);
    for (int l = lanes; l < VL<float>; ++l) scale[c + l] = shift[c + l] = 0;
  }
}

// rows = rows * weight + bias, in place; the padding columns stay 0
inline void affine_rows(float* rows, const float* weight, const float* bias, int tokens, int dim, int ld) {
  if (!weight && !bias) return;
  for (int n = 0; n < tokens; ++n, rows += ld)
    for (int c = 0; c < dim; c += VL<float>) {
      auto part = [&](const float* p) { return dim - c < VL<float> ? load(p + c, dim - c) : load(p + c); };
      V<float> x = load(rows + c);
      if (weight) x *= part(weight);
      if (bias) x += part(bias);
      store(rows + c, x);
    }
}

}  // namespace
}  // namespace XK_LEVEL
}  // namespace xk
