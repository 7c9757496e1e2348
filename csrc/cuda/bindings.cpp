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
// a tensor for the workspace, if one is needed; the tensor is kept alive until all kernels are launched. Returns False,
// and has launched nothing, if the function returns XK_UNALIGNED.
template <class Args, class... P>
auto on_device(Args (*build)(P...), int (*function)(const Args*, const xk_cuda_launch*),
               int64_t (*workspace)(const Args*, const xk_cuda_launch*)) {
  return [=](P... p, int device, uintptr_t stream, const py::object& allocate, int path, bool padded) {
    Args args = build(p...);
    xk_cuda_launch launch = {device, reinterpret_cast<void*>(stream), nullptr, path, padded};
    py::object memory;
    int64_t bytes = workspace(&args, &launch);
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
    if (status == XK_UNALIGNED) return false;
    check(status);
    return true;
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
  m.def("xfa_forward", on_device(xfa_forward_args, xk_cuda_xfa_forward, xk_cuda_xfa_forward_workspace));
  m.def("xfa_backward", on_device(xfa_backward_args, xk_cuda_xfa_backward, xk_cuda_xfa_backward_workspace));
  m.def("launched", &xk_cuda_launched);
  m.def("build_info", &build_info);
}
