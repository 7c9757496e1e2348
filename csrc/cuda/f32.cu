// Placeholder of the kernels of one dtype.
namespace xk::cuda {

__global__ void copy_f32(float* out, const float* in) { out[threadIdx.x] = in[threadIdx.x]; }

}  // namespace xk::cuda
