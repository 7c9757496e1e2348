// C API of the compiled kernels: plain structs of pointers, sizes, strides and codes. No torch, no Python.
//
// Every function operates on (batch, heads, tokens, features) tensors with any strides and returns a status.
// Notation: G is a Gram matrix, A an attention map, W the D x D operand of a mix.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// XK_BAD_ARGUMENT: a tensor has no features (batch, heads and tokens may be 0), or no instruction level is usable.
// XK_CUDA_ERROR: see xk_cuda_error. XK_UNALIGNED: see xk_cuda_xfa_forward.
enum xk_status { XK_OK = 0, XK_OUT_OF_MEMORY = 1, XK_BAD_ARGUMENT = 2, XK_CUDA_ERROR = 3, XK_UNALIGNED = 4 };
enum xk_dtype { XK_F32 = 0, XK_F64 = 1, XK_BF16 = 2, XK_F16 = 3 };
enum xk_map { XK_QUERY_KEY = 0, XK_KEY_VALUE = 1 };
// With XK_NO_NORM, q and k are used unnormalised.
enum xk_norm { XK_TOKEN_NORM = 0, XK_FEATURE_NORM = 1, XK_NO_NORM = 2 };
enum xk_activation { XK_SOFTMAX = 0, XK_IDENTITY = 1 };
// Feature map phi(x) of linear attention: x, max(x, 0), elu(x) + 1, softmax over the features of each token, or softmax
// over the tokens.
enum xk_features {
  XK_IDENTITY_FEATURES = 0,
  XK_RELU = 1,
  XK_ELU_PLUS_1 = 2,
  XK_SOFTMAX_FEATURES = 3,
  XK_SOFTMAX_TOKENS = 4  // for keys only
};

// Strides are in elements and may be zero or negative. A null pointer means that the tensor is absent.
typedef struct {
  void* data;
  int64_t stride_b, stride_h, stride_n, stride_d;
  int32_t dtype;
} xk_tensor;

// A (batch, tokens) bool mask; tokens where it is false are ignored.
typedef struct {
  const uint8_t* data;
  int64_t stride_b, stride_n;
} xk_mask;

// One value per head: the temperature (H,) and its gradient.
typedef struct {
  void* data;
  int64_t stride;
  int32_t dtype;
} xk_per_head;

// g[b,h,i,j] = sum_n a[b,h,n,i] b[b,h,n,j];  ssq_a[b,h,i] = sum_n a^2;  ssq_b likewise.
// g, ssq_a and ssq_b are contiguous, in the accumulate dtype (f64 for f64 operands, otherwise f32).
typedef struct {
  int64_t batch, heads, tokens, dim_a, dim_b;
  xk_tensor a, b;
  int32_t symmetric;  // a is b: one operand is read and half of g is computed
  xk_mask mask;
  void *g, *ssq_a, *ssq_b;
  int32_t threads;
} xk_gram_args;

// y[n,o] = sum_i w[o,i] x[n,i] + sum_i w2[o,i] x2[n,i] + bias[o] + scale[o] * add[n,o], for each (b, h).
// Tensors other than x, x2, add and y use stride_n for the row o and stride_d for the column i.
// bias and scale: stride_d is the stride over o. If add is present and scale is absent, scale is 1. dim_in2 is 0 if x2
// is absent; other tensors are absent if their data is null. Empty tensors may have null data too.
typedef struct {
  int64_t batch, heads, tokens, dim_in, dim_in2, dim_out;
  xk_tensor x, weight, bias, add, scale, x2, weight2, y;
  int32_t threads;
} xk_channel_mix_args;

// Applied to each token x[n] of an operand as it is read; means are over the features of the token:
//   layer_norm != 0:   u[n,i] = (x[n,i] - mean(x[n])) / sqrt(mean((x[n] - mean(x[n]))^2) + eps) - center[i]
//   otherwise:         u[n,i] = x[n,i] - center[i]
// center: (batch, heads, features) in the accumulate dtype, contiguous, or null for zeros.
typedef struct {
  int32_t layer_norm;
  double eps;
  const void* center;
} xk_prologue;

// gram with u in place of b (and of a, if symmetric), and the sums over tokens: sum_a[b,h,i] = sum_n a[b,h,n,i], and
// sum_b likewise for u; contiguous, in the accumulate dtype. Sums of squares are not computed.
typedef struct {
  xk_gram_args gram;
  xk_prologue prologue;
  void *sum_a, *sum_b;
} xk_layer_gram_args;

// channel_mix with u in place of x2, or of x if x2 is absent. differentiate: the mix without `add` is a gradient with
// respect to u; y is the gradient with respect to the operand from which u was computed, plus `add`. dim_out is then
// the number of features of u.
typedef struct {
  xk_channel_mix_args mix;
  xk_prologue prologue;
  int32_t differentiate;
} xk_layer_mix_args;

// The maps of a layer in Gram form, and their derivatives, for each (b, h): the functions layer_maps and
// layer_maps_backward of xformer_kernels/layer/maps.py, which has the formulas. All arrays are contiguous, of `dtype`
// (XK_F32 or XK_F64), except dtemperature, which is double. D is dim, C features, and r is 3 for XK_KEY_VALUE, else 2:
//   qkv (3, heads, D, C)   qkv_bias (3, heads, D)   temperature (heads)   s, c (batch, C)   n (batch)
//   P, X (batch, r, heads, D, C)   x (batch, r, heads, D)   T, dT, dz (batch, heads, D, C)   e, de (batch, heads, D)
//   cos, keep (batch, heads, D, D)   norms (batch, 2, heads, D)   dshifted (batch, 3, heads, D)
//   dtemperature (batch, heads)
// normalised: whether q and k are divided by their norms. keep may be null. Forward reads P and writes T, e, cos and
// norms; backward reads dT, de, cos and norms, and writes X, x, T, e, dz, dshifted and dtemperature. CPU only.
typedef struct {
  int64_t batch, heads, dim, features;
  int32_t dtype, map, activation, normalised;
  double eps;
  const void *qkv, *qkv_bias, *temperature, *s, *n, *c, *keep, *P, *dT, *de;
  void *T, *e, *cos, *norms, *X, *x, *dz, *dshifted;
  double* dtemperature;
  int32_t threads;
} xk_layer_maps_args;

// Forward writes out and stats; backward reads stats and writes dq, dk, dv and dtemperature.
// stats: contiguous (batch, heads, dim * dim + 2 * dim), in the accumulate dtype: the normalised map with key features
// as rows, then the norms of the features of q and of k over the tokens (token norm only, before the clamp by eps).
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
//   out[n,j] = scale sum_i phi_q(q)[n,i] S[i,j] / (sum_i phi_q(q)[n,i] z[i] + eps)      otherwise without the division
// q has `queries` tokens, k and v have `tokens`; v, out and dout have dim_v features, the others dim.
// Forward writes out and stats; backward reads stats and writes dq, dk and dv. stats: contiguous
// (batch, heads, dim * dim_v + dim), in the accumulate dtype: S, then z. For a softmax over the tokens, z holds the
// sums of the exponentials, and dim more numbers follow: the maximum of each feature of k.
typedef struct {
  int64_t batch, heads, queries, tokens, dim, dim_v;
  int32_t features_q, features_k, normalize;
  double scale, eps;
  xk_tensor q, k, v, out, dout, dq, dk, dv;
  xk_mask query_mask, token_mask;
  void* stats;
  int32_t threads;
} xk_linear_attention_args;

// Batch norm over features with running statistics: weight (z - mean) / sqrt(variance + eps) + bias. No batch norm if
// variance is null; weight and bias may be null.
typedef struct {
  const float *mean, *variance, *weight, *bias;
  double eps;
} xk_batch_norm;

// y = act(norm(layer_norm(x) weight^T + bias)) + add, in float32: x (tokens, dim_in), weight (dim_out, dim_in),
// add and y (tokens, dim_out), all contiguous.
// layer_norm: whether the layer norm is applied; its weight and bias, and bias and add, may be null. packed: null, or
// the weight as packed by xk_pack_linear; `weight` is not read then, and batch norm is not supported. CPU only.
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

// packed: room for dim_in rows of dim_out numbers, with dim_out rounded up to a multiple of 16. How many of them are
// used depends on the instruction level: a weight packed by one level must not be used by another.
typedef struct {
  int64_t dim_in, dim_out;
  const float* weight;
  float* packed;
} xk_pack_linear_args;

// y = act(norm(depthwise_convolution(x) + bias)), in float32: x (batch, height, width, channels), contiguous; weight
// (channels, kernel, kernel); y (batch, ceil(height / stride), ceil(width / stride), channels). kernel is 3 or 5,
// stride 1 or 2, padding kernel / 2 (rounded down) with zeros. CPU only.
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
int xk_layer_maps(const xk_layer_maps_args* args);
int xk_layer_maps_backward(const xk_layer_maps_args* args);
int xk_xfa_forward(const xk_xfa_args* args);
int xk_xfa_backward(const xk_xfa_args* args);
int xk_linear_attention_forward(const xk_linear_attention_args* args);  // this and the following: CPU only
int xk_linear_attention_backward(const xk_linear_attention_args* args);
int xk_linear(const xk_linear_args* args);
int xk_pack_linear(const xk_pack_linear_args* args);
int xk_depthwise(const xk_depthwise_args* args);

// Advises the operating system, where supported, to back newly allocated memory with huge pages: otherwise a large
// result is page-faulted 4 KiB at a time, which takes longer than computing it. Contents do not change; cannot fail.
void xk_prefer_huge_pages(void* data, int64_t bytes);

// Instruction level in use ("x86_64_v4", ...), chosen at first use: the best one that was built and that the processor
// supports, or the one named by XFORMER_KERNELS_CPU_LEVEL. Empty if that level is unknown or not usable here. On Zen 4,
// the level "zen4" computes some calls in place of the chosen level (see cpu/dispatch.cpp).
const char* xk_cpu_level(void);

// xfa for CUDA devices, in a separate library: f32, bf16 and f16 tokens of up to 64 features, without norms over
// features; the temperature is f32, bf16 or f16. `threads` is not used; stats are laid out as above, and are for the
// backward of the same library. The functions launch on `stream` and return without waiting.
//
// If the tokens of a head fit into shared memory, a call is one launch and tokens have any strides (features of results
// lie together). Otherwise it is two passes over the tokens. These return XK_UNALIGNED, and launch nothing, unless
// stride_d of all tokens, results and gradients is 1, their addresses and other strides are multiples of 16 bytes, and
// so is the size of a token, or `padded` is set: then what follows a token up to the next multiple of 16 bytes is read,
// and must be 0, and is overwritten in results.
enum xk_cuda_path { XK_ANY_PATH = 0, XK_ONE_LAUNCH = 1, XK_TWO_PASSES = 2 };
typedef struct {
  int32_t device;   // index of the device that holds the tensors
  void* stream;     // cudaStream_t
  void* workspace;  // of the size that the function's _workspace returns, aligned to 256 bytes; scratch only
  int32_t path;     // xk_cuda_path; XK_ONE_LAUNCH fails if the tokens do not fit
  int32_t padded;   // whether tokens, results and gradients are padded: see above
} xk_cuda_launch;

int xk_cuda_xfa_forward(const xk_xfa_args* args, const xk_cuda_launch* launch);
int xk_cuda_xfa_backward(const xk_xfa_args* args, const xk_cuda_launch* launch);

// Size of the workspace of a call in bytes; depends on everything but addresses. Negative on error.
int64_t xk_cuda_xfa_forward_workspace(const xk_xfa_args* args, const xk_cuda_launch* launch);
int64_t xk_cuda_xfa_backward_workspace(const xk_xfa_args* args, const xk_cuda_launch* launch);

// The message of this thread's last call that failed, and the names of the kernels that its last call launched,
// separated by spaces.
const char* xk_cuda_error(void);
const char* xk_cuda_launched(void);

#ifdef __cplusplus
}
#endif
