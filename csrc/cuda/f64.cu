// Placeholder of the kernels of one dtype.
namespace xk::cuda {

__global__ void copy_f64(double* out, const double* in) { out[threadIdx.x] = in[threadIdx.x]; }

}  // namespace xk::cuda
