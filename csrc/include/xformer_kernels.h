// C API of the compiled kernels: plain structs of pointers, sizes, strides and codes. No torch, no Python.
//
// Every function computes on (batch, heads, tokens, features) tensors of any strides and returns a status.
// Names and formulas are those of the project's design notes: G = gram, A = map, W = the D x D operand of a mix.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// XK_BAD_ARGUMENT: a tensor without features (batch, heads and tokens may be 0), or no usable instruction level.
// XK_CUDA_ERROR: see xk_cuda_error.
enum xk_status { XK_OK = 0, XK_OUT_OF_MEMORY = 1, XK_BAD_ARGUMENT = 2, XK_CUDA_ERROR = 3 };
enum xk_dtype { XK_F32 = 0, XK_F64 = 1, XK_BF16 = 2, XK_F16 = 3 };
enum xk_map { XK_QUERY_KEY = 0, XK_KEY_VALUE = 1 };
// Without norms q and k are taken as they are.
enum xk_norm { XK_TOKEN_NORM = 0, XK_FEATURE_NORM = 1, XK_NO_NORM = 2 };
enum xk_activation { XK_SOFTMAX = 0, XK_IDENTITY = 1 };
// phi(x) of linear attention: x, max(x, 0), elu(x) + 1, a softmax over the features of a token, or over the tokens.
enum xk_features {
  XK_IDENTITY_FEATURES = 0,
  XK_RELU = 1,
  XK_ELU_PLUS_1 = 2,
  XK_SOFTMAX_FEATURES = 3,
  XK_SOFTMAX_TOKENS = 4  // of keys only
};

// Strides are in elements and may be zero or negative. A null pointer means "absent".
typedef struct {
  void* data;
  int64_t stride_b, stride_h, stride_n, stride_d;
  int32_t dtype;
} xk_tensor;

// stride_b and stride_n of a (batch, tokens) bool mask; false tokens take no part.
typedef struct {
  const uint8_t* data;
  int64_t stride_b, stride_n;
} xk_mask;

// One value per head: temperature (H,) and its gradient.
typedef struct {
  void* data;
  int64_t stride;
  int32_t dtype;
} xk_per_head;

// g[b,h,i,j] = sum_n a[b,h,n,i] b[b,h,n,j];  ssq_a[b,h,i] = sum_n a^2;  ssq_b likewise.
// g, ssq_a, ssq_b are contiguous, in the accumulate dtype (f64 for f64 operands, else f32).
typedef struct {
  int64_t batch, heads, tokens, dim_a, dim_b;
  xk_tensor a, b;
  int32_t symmetric;  // a is b: only one operand is read and half of g is computed
  xk_mask mask;
  void *g, *ssq_a, *ssq_b;
  int32_t threads;
} xk_gram_args;

// y[n,o] = sum_i w[o,i] x[n,i] + sum_i w2[o,i] x2[n,i] + bias[o] + scale[o] * add[n,o], for each (b, h).
// Tensors other than x, x2, add and y use stride_n for the row o and stride_d for the column i.
// bias and scale: stride_d runs over o. An absent scale with a present add means 1. dim_in2 is 0 where there is no x2;
// other tensors are absent where their data is null, which empty ones may have too.
typedef struct {
  int64_t batch, heads, tokens, dim_in, dim_in2, dim_out;
  xk_tensor x, weight, bias, add, scale, x2, weight2, y;
  int32_t threads;
} xk_channel_mix_args;

// What is done to each token x[n] of an operand while it is read, with means over its features (layer_norm != 0):
//   u[n,i] = (x[n,i] - mean(x[n])) / sqrt(mean((x[n] - mean(x[n]))^2) + eps) - center[i]        else x[n,i] - center[i]
// center: (batch, heads, features) in the accumulate dtype, contiguous, or null.
typedef struct {
  int32_t layer_norm;
  double eps;
  const void* center;
} xk_prologue;

// gram with u in the place of b (and of a, if symmetric), and sums over tokens: sum_a[b,h,i] = sum_n a[b,h,n,i], sum_b
// likewise of u; contiguous, in the accumulate dtype. The sums of squares are not computed.
typedef struct {
  xk_gram_args gram;
  xk_prologue prologue;
  void *sum_a, *sum_b;
} xk_layer_gram_args;

// channel_mix with u in the place of x2, or of x if there is no x2. differentiate: the sum without `add` is taken for a
// gradient with regard to u, and y is the one with regard to what u was made of, and `add` (dim_out is that of u).
typedef struct {
  xk_channel_mix_args mix;
  xk_prologue prologue;
  int32_t differentiate;
} xk_layer_mix_args;

// Forward writes out and stats; backward reads stats and writes dq, dk, dv, dtemperature.
// stats: contiguous (batch, heads, dim * dim + 2 * dim), accumulate dtype: the normalised map with key features
// as rows, then the norms of q's and k's features over tokens (token norm only, before the clamp by eps).
typedef struct {
  int64_t batch, heads, tokens, dim;
  int32_t map, norm, activation;
  double eps;
  xk_tensor q, k, v, out, dout, dq, dk, dv;
  xk_per_head temperature, dtemperature;
  xk_mask mask;
  void* stats;
  int32_t threads;
} xk_xfa_args;

// S[i,j] = sum_m phi_k(k)[m,i] v[m,j], z[i] = sum_m phi_k(k)[m,i]; normalize:
//   out[n,j] = scale sum_i phi_q(q)[n,i] S[i,j] / (sum_i phi_q(q)[n,i] z[i] + eps)        else without the division.
// q has `queries` tokens, k and v have `tokens`; v, out and dout have dim_v features, the others dim.
// Forward writes out and stats; backward reads stats and writes dq, dk, dv. stats: contiguous
// (batch, heads, dim * dim_v + dim), accumulate dtype: S and z. Of a softmax over tokens z are the sums of
// exponentials, and dim more numbers are the maxima of k's features.
typedef struct {
  int64_t batch, heads, queries, tokens, dim, dim_v;
  int32_t features_q, features_k, normalize;
  double scale, eps;
  xk_tensor q, k, v, out, dout, dq, dk, dv;
  xk_mask query_mask, token_mask;
  void* stats;
  int32_t threads;
} xk_linear_attention_args;

// Batch norm of features with running statistics: weight (z - mean) / sqrt(variance + eps) + bias. variance null: none;
// weight and bias may be null.
typedef struct {
  const float *mean, *variance, *weight, *bias;
  double eps;
} xk_batch_norm;

// y = act(norm(layer_norm(x) weight^T + bias)) + add, of float32: x (tokens, dim_in), weight (dim_out, dim_in),
// add and y (tokens, dim_out), all side by side.
// layer_norm: whether there is one; its weight and bias, bias and add may be null. packed: null, or what xk_pack_linear
// has made of the weight, which is not read then; there is no batch norm then. Only the CPU has it.
typedef struct {
  int64_t tokens, dim_in, dim_out;
  const float *x, *layer_norm_weight, *layer_norm_bias;
  int32_t layer_norm;
  double layer_norm_eps;
  const float *weight, *packed, *bias;
  xk_batch_norm norm;
  int32_t hard_swish;
  const float* add;
  float* y;
  int32_t threads;
} xk_linear_args;

// packed: dim_in rows of dim_out numbers, rounded up to a multiple of 16. How many of these are used depends on the
// instruction level: what one has packed is for no other.
typedef struct {
  int64_t dim_in, dim_out;
  const float* weight;
  float* packed;
} xk_pack_linear_args;

// y = act(norm(convolution of every channel by itself + bias)), of float32: x (batch, height, width, channels) side by
// side, weight (channels, kernel, kernel), y (batch, ceil(height / stride), ceil(width / stride), channels). kernel is
// 3 or 5, stride 1 or 2, and kernel / 2 zeros are around the image. Only the CPU has it.
typedef struct {
  int64_t batch, height, width, channels;
  int32_t kernel, stride;
  const float *x, *weight, *bias;
  xk_batch_norm norm;
  int32_t hard_swish;
  float* y;
  int32_t threads;
} xk_depthwise_args;

int xk_gram(const xk_gram_args* args);
int xk_channel_mix(const xk_channel_mix_args* args);
int xk_layer_gram(const xk_layer_gram_args* args);
int xk_layer_mix(const xk_layer_mix_args* args);
int xk_xfa_forward(const xk_xfa_args* args);
int xk_xfa_backward(const xk_xfa_args* args);
int xk_linear_attention_forward(const xk_linear_attention_args* args);  // of the CPU only, as what follows
int xk_linear_attention_backward(const xk_linear_attention_args* args);
int xk_linear(const xk_linear_args* args);
int xk_pack_linear(const xk_pack_linear_args* args);
int xk_depthwise(const xk_depthwise_args* args);

// Asks the system to back fresh memory with huge pages, where it knows how: a large result is otherwise page-faulted
// 4 KiB at a time, which takes longer than computing it. A wish: it changes no contents and cannot fail.
void xk_prefer_huge_pages(void* data, int64_t bytes);

// Instruction level in use ("x86_64_v4", ...). Chosen at first use: the best that was built and that this processor
// has, or the one named by XFORMER_KERNELS_CPU_LEVEL. Empty if that name is unknown or not usable here. Beside
// x86_64_v4, some numbers of features are computed by x86_64_v4_256 where that is faster.
const char* xk_cpu_level(void);

// The same functions on a CUDA device, from a library of their own. `threads` is not used; stats are as above, for the
// same library's backward. They launch on `stream` and return.
enum xk_cuda_path { XK_ANY_PATH = 0, XK_ONE_LAUNCH = 1, XK_TWO_PASSES = 2 };
typedef struct {
  int32_t device;   // whose memory the tensors are in
  void* stream;     // cudaStream_t
  void* workspace;  // as many bytes as the function's _workspace says, at a multiple of 256; not needed afterwards
  int32_t tf32;     // whether products of f32 may be cut to tf32
  int32_t path;     // of xk_cuda_path, for xfa: XK_ONE_LAUNCH fails where tokens do not fit
} xk_cuda_launch;

int xk_cuda_gram(const xk_gram_args* args, const xk_cuda_launch* launch);
int xk_cuda_channel_mix(const xk_channel_mix_args* args, const xk_cuda_launch* launch);
int xk_cuda_xfa_forward(const xk_xfa_args* args, const xk_cuda_launch* launch);
int xk_cuda_xfa_backward(const xk_xfa_args* args, const xk_cuda_launch* launch);

// Bytes of workspace of a call, from all but its addresses; negative after an error.
int64_t xk_cuda_gram_workspace(const xk_gram_args* args, const xk_cuda_launch* launch);
int64_t xk_cuda_xfa_forward_workspace(const xk_xfa_args* args, const xk_cuda_launch* launch);
int64_t xk_cuda_xfa_backward_workspace(const xk_xfa_args* args, const xk_cuda_launch* launch);

// What went wrong in this thread's last call that failed, and the names of the kernels that its last call launched,
// with a space between them.
const char* xk_cuda_error(void);
const char* xk_cuda_launched(void);

#ifdef __cplusplus
}
#endif
