// Python module _C: the CPU functions of the C API, and information about the build.
#include "bindings.h"

#include <array>
#include <new>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "program.h"

namespace {

template <class F>
void without_gil(F f) {
  int status;
  {
    py::gil_scoped_release release;
    status = f();
  }
  if (status == XK_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status != XK_OK) {
    throw std::invalid_argument("xformer_kernels._C: a tensor without features, or no usable instruction level");
  }
}

template <class Args>
void call(int (*function)(const Args*), const Args& args) {
  without_gil([&] { return function(&args); });
}

// A Python function that takes the arguments of `build` and the number of threads.
template <class Args, class... P>
auto on_cpu(Args (*build)(P...), int (*function)(const Args*)) {
  return [=](P... p, int threads) {
    Args args = build(p...);
    args.threads = threads;
    call(function, args);
  };
}

xk_prologue prologue(uintptr_t center, std::optional<double> layer_norm_eps) {
  return {layer_norm_eps.has_value(), layer_norm_eps.value_or(0), reinterpret_cast<void*>(center)};
}

// A Python function that takes the arguments of `build`, the prologue (address of center; eps of the layer norm, None
// for no layer norm), the addresses of the sums and the number of threads.
template <class... P>
auto layer_gram(xk_gram_args (*build)(P...)) {
  return [=](P... p, uintptr_t center, std::optional<double> layer_norm_eps, uintptr_t sum_a, uintptr_t sum_b,
             int threads) {
    xk_layer_gram_args args = {build(p...), prologue(center, layer_norm_eps), reinterpret_cast<void*>(sum_a),
                               reinterpret_cast<void*>(sum_b)};
    args.gram.threads = threads;
    call(xk_layer_gram, args);
  };
}

template <class... P>
auto layer_mix(xk_channel_mix_args (*build)(P...)) {
  return [=](P... p, uintptr_t center, std::optional<double> layer_norm_eps, bool differentiate, int threads) {
    xk_layer_mix_args args = {build(p...), prologue(center, layer_norm_eps), differentiate};
    args.mix.threads = threads;
    call(xk_layer_mix, args);
  };
}

// A Python function of the sizes (batch, heads, dim, features), the choices, the addresses of what is read and of what
// is written, in the order of the fields of xk_layer_maps_args, and the number of threads.
auto layer_maps(int (*function)(const xk_layer_maps_args*)) {
  return [=](const Strides& sizes, int dtype, int map, int activation, bool normalised, double eps,
             const std::array<uintptr_t, 10>& in, const std::array<uintptr_t, 9>& out, int threads) {
    xk_layer_maps_args p = {};
    p.batch = sizes.b, p.heads = sizes.h, p.dim = sizes.n, p.features = sizes.d;
    p.dtype = dtype, p.map = map, p.activation = activation, p.normalised = normalised, p.eps = eps;
    const void** const read[] = {&p.qkv, &p.qkv_bias, &p.temperature, &p.s, &p.n, &p.c, &p.keep, &p.P, &p.dT, &p.de};
    void** const written[] = {&p.T, &p.e, &p.cos, &p.norms, &p.X, &p.x, &p.dz, &p.dshifted};
    for (size_t i = 0; i < in.size(); ++i) *read[i] = reinterpret_cast<const void*>(in[i]);
    for (size_t i = 0; i < out.size() - 1; ++i) *written[i] = reinterpret_cast<void*>(out[i]);
    p.dtemperature = reinterpret_cast<double*>(out.back());
    p.threads = threads;
    call(function, p);
  };
}

const float* floats(uintptr_t data) { return reinterpret_cast<const float*>(data); }

// Addresses of the running mean, running variance, weight and bias of a batch norm, and its eps.
typedef std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, double> Norm;
xk_batch_norm batch_norm(const Norm& n) {
  return {floats(std::get<0>(n)), floats(std::get<1>(n)), floats(std::get<2>(n)), floats(std::get<3>(n)),
          std::get<4>(n)};
}

void linear(int64_t tokens, int64_t dim_in, int64_t dim_out, uintptr_t x, uintptr_t layer_norm_weight,
            uintptr_t layer_norm_bias, std::optional<double> layer_norm_eps, uintptr_t weight, uintptr_t packed,
            uintptr_t bias, const Norm& norm, bool hard_swish, uintptr_t add, uintptr_t y, int threads) {
  call(xk_linear,
       xk_linear_args{tokens, dim_in, dim_out, floats(x), floats(layer_norm_weight), floats(layer_norm_bias),
                      layer_norm_eps.has_value(), layer_norm_eps.value_or(0), floats(weight), floats(packed),
                      floats(bias), batch_norm(norm), hard_swish, floats(add), reinterpret_cast<float*>(y), threads});
}

void pack_linear(int64_t dim_in, int64_t dim_out, uintptr_t weight, uintptr_t packed) {
  call(xk_pack_linear, xk_pack_linear_args{dim_in, dim_out, floats(weight), reinterpret_cast<float*>(packed)});
}

void depthwise(int64_t batch, int64_t height, int64_t width, int64_t channels, int kernel, int stride, uintptr_t x,
               uintptr_t weight, uintptr_t bias, const Norm& norm, bool hard_swish, uintptr_t y, int threads) {
  call(xk_depthwise,
       xk_depthwise_args{batch, height, width, channels, kernel, stride, floats(x), floats(weight), floats(bias),
                         batch_norm(norm), hard_swish, reinterpret_cast<float*>(y), threads});
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
  m.def("gram", on_cpu(gram_args, xk_gram));
  m.def("channel_mix", on_cpu(channel_mix_args, xk_channel_mix));
  m.def("layer_gram", layer_gram(gram_args));
  m.def("layer_mix", layer_mix(channel_mix_args));
  m.def("layer_maps", layer_maps(xk_layer_maps));
  m.def("layer_maps_backward", layer_maps(xk_layer_maps_backward));
  m.def("xfa_forward", on_cpu(xfa_forward_args, xk_xfa_forward));
  m.def("xfa_backward", on_cpu(xfa_backward_args, xk_xfa_backward));
  m.def("linear_attention_forward", on_cpu(linear_attention_args, xk_linear_attention_forward));
  m.def("linear_attention_backward", on_cpu(linear_attention_args, xk_linear_attention_backward));
  m.def("linear", &linear);
  m.def("pack_linear", &pack_linear);
  m.def("depthwise", &depthwise);
  py::class_<Program>(m, "Program")
      .def(py::init<>())
      .def("linear", &Program::linear)
      .def("depthwise", &Program::depthwise)
      .def("xfa", &Program::xfa)
      .def("run", [](const Program& program, const std::vector<uintptr_t>& blocks, int threads) {
        without_gil([&] { return program.run(blocks, threads); });
      });
  m.def("prefer_huge_pages", &prefer_huge_pages);
  m.def("cpu_level", &xk_cpu_level);
  m.def("build_info", &build_info);
}
