// Python module _C: the C API, taking addresses and stride tuples, and facts about the build. It knows neither torch
// nor tensors; the shapes and dtypes it is given were checked by the Python side.
#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>

#include "include/xformer_kernels.h"

namespace py = pybind11;

namespace {

// A tuple of four strides, as torch.Tensor.stride() returns it.
struct Strides {
  int64_t b, h, n, d;
};

}  // namespace

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

namespace {

xk_tensor tensor(uintptr_t data, const Strides& s, int dtype) {
  return {reinterpret_cast<void*>(data), s.b, s.h, s.n, s.d, dtype};
}
xk_mask mask(uintptr_t data, int64_t stride_b, int64_t stride_n) {
  return {reinterpret_cast<const uint8_t*>(data), stride_b, stride_n};
}

template <class Args>
void call(int (*function)(const Args*), const Args& args) {
  int status;
  {
    py::gil_scoped_release release;
    status = function(&args);
  }
  if (status == XK_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status != XK_OK) {
    throw std::invalid_argument("xformer_kernels._C: a tensor without features, or no usable instruction level");
  }
}

void gram(const Strides& sizes, int64_t dim_b, int dtype, uintptr_t a, const Strides& as, uintptr_t b,
          const Strides& bs, bool symmetric, uintptr_t mask_data, int64_t mask_b, int64_t mask_n, uintptr_t g,
          uintptr_t ssq_a, uintptr_t ssq_b, int threads) {
  xk_gram_args p = {};
  p.batch = sizes.b, p.heads = sizes.h, p.tokens = sizes.n, p.dim_a = sizes.d, p.dim_b = dim_b;
  p.a = tensor(a, as, dtype), p.b = tensor(b, bs, dtype);
  p.symmetric = symmetric;
  p.mask = mask(mask_data, mask_b, mask_n);
  p.g = reinterpret_cast<void*>(g);
  p.ssq_a = reinterpret_cast<void*>(ssq_a);
  p.ssq_b = reinterpret_cast<void*>(ssq_b);
  p.threads = threads;
  call(xk_gram, p);
}

void channel_mix(const Strides& sizes, int64_t dim_in2, int64_t dim_out, int dtype, uintptr_t x, const Strides& xs,
                 uintptr_t weight, const Strides& ws, int weight_dtype, uintptr_t bias, const Strides& bias_s,
                 int bias_dtype, uintptr_t add, const Strides& add_s, uintptr_t scale, const Strides& scale_s,
                 int scale_dtype, uintptr_t x2, const Strides& x2s, uintptr_t weight2, const Strides& w2s,
                 int weight2_dtype, uintptr_t y, const Strides& ys, int threads) {
  xk_channel_mix_args p = {};
  p.batch = sizes.b, p.heads = sizes.h, p.tokens = sizes.n, p.dim_in = sizes.d;
  p.dim_in2 = dim_in2, p.dim_out = dim_out;
  p.x = tensor(x, xs, dtype), p.weight = tensor(weight, ws, weight_dtype), p.bias = tensor(bias, bias_s, bias_dtype);
  p.add = tensor(add, add_s, dtype), p.scale = tensor(scale, scale_s, scale_dtype);
  p.x2 = tensor(x2, x2s, dtype), p.weight2 = tensor(weight2, w2s, weight2_dtype), p.y = tensor(y, ys, dtype);
  p.threads = threads;
  call(xk_channel_mix, p);
}

xk_xfa_args xfa_args(const Strides& sizes, int dtype, int map, int norm, int activation, double eps, uintptr_t q,
                     const Strides& qs, uintptr_t k, const Strides& ks, uintptr_t v, const Strides& vs,
                     uintptr_t temperature, int64_t temperature_stride, int temperature_dtype, uintptr_t mask_data,
                     int64_t mask_b, int64_t mask_n, uintptr_t stats, int threads) {
  xk_xfa_args p = {};
  p.batch = sizes.b, p.heads = sizes.h, p.tokens = sizes.n, p.dim = sizes.d;
  p.map = map, p.norm = norm, p.activation = activation, p.eps = eps;
  p.q = tensor(q, qs, dtype), p.k = tensor(k, ks, dtype), p.v = tensor(v, vs, dtype);
  p.temperature = {reinterpret_cast<void*>(temperature), temperature_stride, temperature_dtype};
  p.mask = mask(mask_data, mask_b, mask_n);
  p.stats = reinterpret_cast<void*>(stats);
  p.threads = threads;
  return p;
}

void xfa_forward(const Strides& sizes, int dtype, int map, int norm, int activation, double eps, uintptr_t q,
                 const Strides& qs, uintptr_t k, const Strides& ks, uintptr_t v, const Strides& vs,
                 uintptr_t temperature, int64_t temperature_stride, int temperature_dtype, uintptr_t mask_data,
                 int64_t mask_b, int64_t mask_n, uintptr_t stats, int threads, uintptr_t out, const Strides& outs) {
  xk_xfa_args p = xfa_args(sizes, dtype, map, norm, activation, eps, q, qs, k, ks, v, vs, temperature,
                           temperature_stride, temperature_dtype, mask_data, mask_b, mask_n, stats, threads);
  p.out = tensor(out, outs, dtype);
  call(xk_xfa_forward, p);
}

void xfa_backward(const Strides& sizes, int dtype, int map, int norm, int activation, double eps, uintptr_t q,
                  const Strides& qs, uintptr_t k, const Strides& ks, uintptr_t v, const Strides& vs,
                  uintptr_t temperature, int64_t temperature_stride, int temperature_dtype, uintptr_t mask_data,
                  int64_t mask_b, int64_t mask_n, uintptr_t stats, int threads, uintptr_t dout, const Strides& douts,
                  uintptr_t dq, uintptr_t dk, uintptr_t dv, const Strides& grads, uintptr_t dtemperature) {
  xk_xfa_args p = xfa_args(sizes, dtype, map, norm, activation, eps, q, qs, k, ks, v, vs, temperature,
                           temperature_stride, temperature_dtype, mask_data, mask_b, mask_n, stats, threads);
  p.dout = tensor(dout, douts, dtype);
  p.dq = tensor(dq, grads, dtype), p.dk = tensor(dk, grads, dtype), p.dv = tensor(dv, grads, dtype);
  p.dtemperature = {reinterpret_cast<void*>(dtemperature), 1, temperature_dtype};
  call(xk_xfa_backward, p);
}

void prefer_huge_pages(uintptr_t data, int64_t bytes) { xk_prefer_huge_pages(reinterpret_cast<void*>(data), bytes); }

#ifndef XK_VERSION
#define XK_VERSION "unknown"
#endif
#ifndef XK_COMPILER
#define XK_COMPILER "unknown"
#endif
#ifndef XK_FLAGS
#define XK_FLAGS "unknown"
#endif
#ifndef XK_LEVELS
#define XK_LEVELS "unknown"
#endif
#ifndef XK_BUILD_TYPE
#define XK_BUILD_TYPE "unknown"
#endif

py::dict build_info() {
  py::dict d;
  d["version"] = XK_VERSION;
  d["compiler"] = XK_COMPILER;
  d["flags"] = XK_FLAGS;
  d["build_type"] = XK_BUILD_TYPE;
  d["levels"] = XK_LEVELS;
#if defined(_OPENMP)
  d["openmp"] = _OPENMP;
#else
  d["openmp"] = py::none();
#endif
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of xformer_kernels: the C API of csrc/include/xformer_kernels.h";
  m.def("gram", &gram);
  m.def("channel_mix", &channel_mix);
  m.def("xfa_forward", &xfa_forward);
  m.def("xfa_backward", &xfa_backward);
  m.def("prefer_huge_pages", &prefer_huge_pages);
  m.def("cpu_level", &xk_cpu_level);
  m.def("build_info", &build_info);
}
