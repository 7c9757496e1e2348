// The functions of the C API for one dtype of tokens; f32.cu and its like instantiate them.
#pragma once

#include "../include/xformer_kernels.h"

namespace xk::cuda {

// Each launches, or with `measure` only says how many bytes of workspace it needs.
template <class T>
struct Backend {
  static int64_t gram(const xk_gram_args& a, const xk_cuda_launch& l, bool measure);
  static void channel_mix(const xk_channel_mix_args& a, const xk_cuda_launch& l);
  static int64_t forward(const xk_xfa_args& a, const xk_cuda_launch& l, bool measure);
  static int64_t backward(const xk_xfa_args& a, const xk_cuda_launch& l, bool measure);
};

}  // namespace xk::cuda
