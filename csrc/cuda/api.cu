// C API for CUDA devices: dispatches on the dtype, and converts exceptions to a status and an error message.
#include <new>

#include "backend.h"
#include "launch.h"
#include "numbers.h"

namespace xk::cuda {

void forget_launches();

namespace {

thread_local std::string last_error;

// Calls f with the Backend of a dtype.
template <class F>
int64_t with_backend(int dtype, F f) {
  switch (dtype) {
#ifdef XK_HAVE_f32
    case XK_F32:
      return f(Backend<float>{});
#endif
#ifdef XK_HAVE_bf16
    case XK_BF16:
      return f(Backend<BFloat>{});
#endif
#ifdef XK_HAVE_f16
    case XK_F16:
      return f(Backend<Half>{});
#endif
  }
  throw Failure{XK_BAD_ARGUMENT, "this build has no kernels of the dtype"};
}

// Returns the status, or if wants_result the result of f (-1 on failure).
template <class F>
int64_t guarded(int dtype, bool wants_result, F f) {
  try {
    int64_t result = with_backend(dtype, f);
    return wants_result ? result : (int64_t)XK_OK;
  } catch (const Failure& failure) {
    last_error = failure.text;
    return wants_result ? -1 : (int64_t)failure.status;
  } catch (const std::bad_alloc&) {
    last_error = "out of host memory";
    return wants_result ? -1 : (int64_t)XK_OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace xk::cuda

using namespace xk::cuda;

extern "C" {

int xk_cuda_xfa_forward(const xk_xfa_args* a, const xk_cuda_launch* l) {
  forget_launches();
  return (int)guarded(a->q.dtype, false, [&](auto backend) { return backend.forward(*a, *l, false); });
}

int xk_cuda_xfa_backward(const xk_xfa_args* a, const xk_cuda_launch* l) {
  forget_launches();
  return (int)guarded(a->q.dtype, false, [&](auto backend) { return backend.backward(*a, *l, false); });
}

int64_t xk_cuda_xfa_forward_workspace(const xk_xfa_args* a, const xk_cuda_launch* l) {
  return guarded(a->q.dtype, true, [&](auto backend) { return backend.forward(*a, *l, true); });
}

int64_t xk_cuda_xfa_backward_workspace(const xk_xfa_args* a, const xk_cuda_launch* l) {
  return guarded(a->q.dtype, true, [&](auto backend) { return backend.backward(*a, *l, true); });
}

const char* xk_cuda_error(void) { return last_error.c_str(); }

}  // extern "C"
