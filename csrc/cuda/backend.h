// The functions of the C API for one dtype of tokens; instantiated in f32.cu, bf16.cu and f16.cu.
#pragma once

#include "../include/xformer_kernels.h"

namespace xk::cuda {

// Each function launches its kernels. With `measure`, it only returns the size of the workspace in bytes.
template <class T>
struct Backend {
  static int64_t forward(const xk_xfa_args& a, const xk_cuda_launch& l, bool measure);
  static int64_t backward(const xk_xfa_args& a, const xk_cuda_launch& l, bool measure);
};

}  // namespace xk::cuda
