#include "run.h"

template struct xk::cuda::Backend<xk::cuda::BFloat>;
