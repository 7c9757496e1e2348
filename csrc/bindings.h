// Converts addresses and stride tuples from Python to the structs of the C API; shared by the modules _C and _cuda.
// Neither depends on torch: shapes and dtypes are checked in Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "include/xformer_kernels.h"

namespace py = pybind11;

// A tuple of four strides, as torch.Tensor.stride() returns it.
struct Strides {
  int64_t b, h, n, d;
};

namespace pybind11::detail {
template <>
struct type_caster<Strides> {
  PYBIND11_TYPE_CASTER(Strides, const_name("tuple[int, int, int, int]"));
  bool load(handle source, bool) {
    PyObject* t = source.ptr();
    if (!PyTuple_Check(t) || PyTuple_GET_SIZE(t) != 4) return false;
    int64_t* out[4] = {&value.b, &value.h, &value.n, &value.d};
    for (int i = 0; i < 4; ++i) {
      *out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(t, i));
      if (*out[i] == -1 && PyErr_Occurred()) throw error_already_set();
    }
    return true;
  }
};
}  // namespace pybind11::detail

inline xk_tensor tensor(uintptr_t data, const Strides& s, int dtype) {
  return {reinterpret_cast<void*>(data), s.b, s.h, s.n, s.d, dtype};
}
inline xk_mask mask(uintptr_t data, int64_t stride_b, int64_t stride_n) {
  return {reinterpret_cast<const uint8_t*>(data), stride_b, stride_n};
}

inline xk_gram_args gram_args(const Strides& sizes, int64_t dim_b, int dtype, uintptr_t a, const Strides& as,
                              uintptr_t b, const Strides& bs, bool symmetric, uintptr_t mask_data, int64_t mask_b,
                              int64_t mask_n, uintptr_t g, uintptr_t ssq_a, uintptr_t ssq_b) {
  xk_gram_args p = {};
  p.batch = sizes.b, p.heads = sizes.h, p.tokens = sizes.n, p.dim_a = sizes.d, p.dim_b = dim_b;
  p.a = tensor(a, as, dtype), p.b = tensor(b, bs, dtype);
  p.symmetric = symmetric;
  p.mask = mask(mask_data, mask_b, mask_n);
  p.g = reinterpret_cast<void*>(g);
  p.ssq_a = reinterpret_cast<void*>(ssq_a);
  p.ssq_b = reinterpret_cast<void*>(ssq_b);
  return p;
}

inline xk_channel_mix_args channel_mix_args(const Strides& sizes, int64_t dim_in2, int64_t dim_out, int dtype,
                                            uintptr_t x, const Strides& xs, uintptr_t weight, const Strides& ws,
                                            int weight_dtype, uintptr_t bias, const Strides& bias_s, int bias_dtype,
                                            uintptr_t add, const Strides& add_s, uintptr_t scale,
                                            const Strides& scale_s, int scale_dtype, uintptr_t x2, const Strides& x2s,
                                            uintptr_t weight2, const Strides& w2s, int weight2_dtype, uintptr_t y,
                                            const Strides& ys) {
  xk_channel_mix_args p = {};
  p.batch = sizes.b, p.heads = sizes.h, p.tokens = sizes.n, p.dim_in = sizes.d;
  p.dim_in2 = dim_in2, p.dim_out = dim_out;
  p.x = tensor(x, xs, dtype), p.weight = tensor(weight, ws, weight_dtype), p.bias = tensor(bias, bias_s, bias_dtype);
  p.add = tensor(add, add_s, dtype), p.scale = tensor(scale, scale_s, scale_dtype);
  p.x2 = tensor(x2, x2s, dtype), p.weight2 = tensor(weight2, w2s, weight2_dtype), p.y = tensor(y, ys, dtype);
  return p;
}

inline xk_xfa_args xfa_args(const Strides& sizes, int dtype, int map, int norm, int activation, double eps, uintptr_t q,
                            const Strides& qs, uintptr_t k, const Strides& ks, uintptr_t v, const Strides& vs,
                            uintptr_t temperature, int64_t temperature_stride, int temperature_dtype,
                            uintptr_t mask_data, int64_t mask_b, int64_t mask_n, uintptr_t stats) {
  xk_xfa_args p = {};
  p.batch = sizes.b, p.heads = sizes.h, p.tokens = sizes.n, p.dim = sizes.d;
  p.map = map, p.norm = norm, p.activation = activation, p.eps = eps;
  p.q = tensor(q, qs, dtype), p.k = tensor(k, ks, dtype), p.v = tensor(v, vs, dtype);
  p.temperature = {reinterpret_cast<void*>(temperature), temperature_stride, temperature_dtype};
  p.mask = mask(mask_data, mask_b, mask_n);
  p.stats = reinterpret_cast<void*>(stats);
  return p;
}

inline xk_xfa_args xfa_forward_args(const Strides& sizes, int dtype, int map, int norm, int activation, double eps,
                                    uintptr_t q, const Strides& qs, uintptr_t k, const Strides& ks, uintptr_t v,
                                    const Strides& vs, uintptr_t temperature, int64_t temperature_stride,
                                    int temperature_dtype, uintptr_t mask_data, int64_t mask_b, int64_t mask_n,
                                    uintptr_t stats, uintptr_t out, const Strides& outs) {
  xk_xfa_args p = xfa_args(sizes, dtype, map, norm, activation, eps, q, qs, k, ks, v, vs, temperature,
                           temperature_stride, temperature_dtype, mask_data, mask_b, mask_n, stats);
  p.out = tensor(out, outs, dtype);
  return p;
}

inline xk_xfa_args xfa_backward_args(const Strides& sizes, int dtype, int map, int norm, int activation, double eps,
                                     uintptr_t q, const Strides& qs, uintptr_t k, const Strides& ks, uintptr_t v,
                                     const Strides& vs, uintptr_t temperature, int64_t temperature_stride,
                                     int temperature_dtype, uintptr_t mask_data, int64_t mask_b, int64_t mask_n,
                                     uintptr_t stats, uintptr_t dout, const Strides& douts, uintptr_t dq, uintptr_t dk,
                                     uintptr_t dv, const Strides& grads, uintptr_t dtemperature) {
  xk_xfa_args p = xfa_args(sizes, dtype, map, norm, activation, eps, q, qs, k, ks, v, vs, temperature,
                           temperature_stride, temperature_dtype, mask_data, mask_b, mask_n, stats);
  p.dout = tensor(dout, douts, dtype);
  p.dq = tensor(dq, grads, dtype), p.dk = tensor(dk, grads, dtype), p.dv = tensor(dv, grads, dtype);
  p.dtemperature = {reinterpret_cast<void*>(dtemperature), 1, temperature_dtype};
  return p;
}

// v_sizes: (batch, heads, tokens, dim_v) of v. The addresses of gradients are 0 in the forward, that of out is 0 in the
// backward.
inline xk_linear_attention_args linear_attention_args(
    const Strides& sizes, const Strides& v_sizes, int dtype, int features_q, int features_k, bool normalize,
    double scale, double eps, uintptr_t q, const Strides& qs, uintptr_t k, const Strides& ks, uintptr_t v,
    const Strides& vs, uintptr_t query_mask, int64_t query_mask_b, int64_t query_mask_n, uintptr_t token_mask,
    int64_t token_mask_b, int64_t token_mask_n, uintptr_t stats, uintptr_t out, const Strides& outs, uintptr_t dout,
    const Strides& douts, uintptr_t dq, const Strides& dqs, uintptr_t dk, const Strides& dks, uintptr_t dv,
    const Strides& dvs) {
  xk_linear_attention_args p = {};
  p.batch = sizes.b, p.heads = sizes.h, p.queries = sizes.n, p.tokens = v_sizes.n, p.dim = sizes.d, p.dim_v = v_sizes.d;
  p.features_q = features_q, p.features_k = features_k, p.normalize = normalize, p.scale = scale, p.eps = eps;
  p.q = tensor(q, qs, dtype), p.k = tensor(k, ks, dtype), p.v = tensor(v, vs, dtype), p.out = tensor(out, outs, dtype);
  p.query_mask = mask(query_mask, query_mask_b, query_mask_n);
  p.token_mask = mask(token_mask, token_mask_b, token_mask_n);
  p.stats = reinterpret_cast<void*>(stats);
  p.dout = tensor(dout, douts, dtype);
  p.dq = tensor(dq, dqs, dtype), p.dk = tensor(dk, dks, dtype), p.dv = tensor(dv, dvs, dtype);
  return p;
}
