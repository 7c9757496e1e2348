// Python module _cuda: the CUDA functions of the C API, and build information.
#include "../bindings.h"

#include <new>
#include <stdexcept>

namespace {

void check(int status) {
  if (status == XK_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status != XK_OK) throw std::runtime_error(std::string("xformer_kernels._cuda: ") + xk_cuda_error());
}

// Wraps a C API function for Python: takes the parameters of `build`, then those of the launch. allocate(bytes) returns
// a tensor for the workspace, if one is needed; the tensor is kept alive until all kernels are launched.
template <class Args, class... P>
auto on_device(Args (*build)(P...), int (*function)(const Args*, const xk_cuda_launch*),
               int64_t (*workspace)(const Args*, const xk_cuda_launch*) = nullptr) {
  return [=](P... p, int device, uintptr_t stream, const py::object& allocate, bool tf32, int path) {
    Args args = build(p...);
    xk_cuda_launch launch = {device, reinterpret_cast<void*>(stream), nullptr, tf32, path};
    py::object memory;
    int64_t bytes = workspace ? workspace(&args, &launch) : 0;
    if (bytes < 0) check(XK_CUDA_ERROR);
    if (bytes > 0) {
      memory = allocate(bytes);
      launch.workspace = reinterpret_cast<void*>(memory.attr("data_ptr")().template cast<uintptr_t>());
    }
    int status;
    {
      py::gil_scoped_release release;
      status = function(&args, &launch);
    }
    check(status);
  };
}

py::dict build_info() {
  py::dict d;
  d["version"] = XK_VERSION;
  d["compiler"] = XK_COMPILER;
  d["host compiler"] = XK_HOST_COMPILER;
  d["archs"] = XK_CUDA_ARCHS;
  d["ptx"] = XK_CUDA_PTX;
  d["dtypes"] = XK_CUDA_DTYPES;
  d["flags"] = XK_FLAGS;
#ifdef XK_EMULATED
  d["emulated"] = true;
#else
  d["emulated"] = false;
#endif
  return d;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Compiled CUDA kernels of xformer_kernels: the C API of csrc/include/xformer_kernels.h";
  m.def("gram", on_device(gram_args, xk_cuda_gram, xk_cuda_gram_workspace));
  m.def("channel_mix", on_device(channel_mix_args, xk_cuda_channel_mix));
  m.def("xfa_forward", on_device(xfa_forward_args, xk_cuda_xfa_forward, xk_cuda_xfa_forward_workspace));
  m.def("xfa_backward", on_device(xfa_backward_args, xk_cuda_xfa_backward, xk_cuda_xfa_backward_workspace));
  m.def("launched", &xk_cuda_launched);
  m.def("build_info", &build_info);
}
