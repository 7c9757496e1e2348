// Python module _cuda: the C API's CUDA functions, and facts about the build.
#include "../bindings.h"

#include <new>
#include <stdexcept>

namespace {

void check(int status) {
  if (status == XK_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status != XK_OK) throw std::runtime_error(std::string("xformer_kernels._cuda: ") + xk_cuda_error());
}

xk_cuda_launch launch_of(int device, uintptr_t stream, uintptr_t workspace, bool tf32, int path) {
  return {device, reinterpret_cast<void*>(stream), reinterpret_cast<void*>(workspace), tf32, path};
}

// A Python function of what `build` takes and of the launch.
template <class Args, class... P>
auto on_device(Args (*build)(P...), int (*function)(const Args*, const xk_cuda_launch*)) {
  return [=](P... p, int device, uintptr_t stream, uintptr_t workspace, bool tf32, int path) {
    Args args = build(p...);
    xk_cuda_launch launch = launch_of(device, stream, workspace, tf32, path);
    int status;
    {
      py::gil_scoped_release release;
      status = function(&args, &launch);
    }
    check(status);
  };
}

// The bytes of workspace that the same call takes.
template <class Args, class... P>
auto workspace_of(Args (*build)(P...), int64_t (*function)(const Args*, const xk_cuda_launch*)) {
  return [=](P... p, int device, bool tf32, int path) {
    Args args = build(p...);
    xk_cuda_launch launch = launch_of(device, 0, 0, tf32, path);
    int64_t bytes = function(&args, &launch);
    if (bytes < 0) check(XK_CUDA_ERROR);
    return bytes;
  };
}

#ifndef XK_VERSION
#define XK_VERSION "unknown"
#define XK_COMPILER "unknown"
#define XK_HOST_COMPILER "unknown"
#define XK_CUDA_ARCHS ""
#define XK_CUDA_PTX ""
#define XK_CUDA_DTYPES "unknown"
#define XK_FLAGS "unknown"
#endif

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
  m.def("gram", on_device(gram_args, xk_cuda_gram));
  m.def("channel_mix", on_device(channel_mix_args, xk_cuda_channel_mix));
  m.def("xfa_forward", on_device(xfa_forward_args, xk_cuda_xfa_forward));
  m.def("xfa_backward", on_device(xfa_backward_args, xk_cuda_xfa_backward));
  m.def("gram_workspace", workspace_of(gram_args, xk_cuda_gram_workspace));
  m.def("xfa_forward_workspace", workspace_of(xfa_forward_args, xk_cuda_xfa_forward_workspace));
  m.def("xfa_backward_workspace", workspace_of(xfa_backward_args, xk_cuda_xfa_backward_workspace));
  m.def("launched", &xk_cuda_launched);
  m.def("build_info", &build_info);
}
