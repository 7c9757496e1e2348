// Python module _cuda: launches on torch's stream, taking addresses, and facts about the build. Placeholder.
#include <pybind11/pybind11.h>

#include "cuda/api.h"

namespace py = pybind11;

namespace {

int fill(uintptr_t stream, uintptr_t data, int64_t count, float value) {
  return xk::cuda::fill(reinterpret_cast<void*>(stream), reinterpret_cast<float*>(data), count, value);
}

py::dict build_info() {
  py::dict info;
  info["version"] = XK_VERSION;
  info["compiler"] = XK_COMPILER;
  info["host compiler"] = XK_HOST_COMPILER;
  info["archs"] = XK_CUDA_ARCHS;
  info["ptx"] = XK_CUDA_PTX;
  info["dtypes"] = XK_CUDA_DTYPES;
  info["flags"] = XK_FLAGS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("fill", &fill);
  m.def("build_info", &build_info);
}
