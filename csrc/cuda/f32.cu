#include "run.h"

template struct xk::cuda::Backend<float>;
