// One vector register of T, written with the vector extensions of GCC and Clang, so that the same source compiles for
// every instruction level and architecture. Intrinsics are used, where the level has them, for partial loads and
// stores.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../include/xformer_kernels.h"

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define XK_INLINE [[gnu::always_inline]] inline

// Hides from the optimiser how a vector was computed.
#if defined(__x86_64__)
#define XK_OPAQUE(x) asm("" : "+v"(x))
#elif defined(__aarch64__)
#define XK_OPAQUE(x) asm("" : "+w"(x))
#else
#define XK_OPAQUE(x) (void)0
#endif

namespace xk {
namespace XK_LEVEL {

// XK_VECTOR_BYTES=32: only half of each register is used, for Zen 4 (see dispatch.cpp).
#if defined(__AVX512F__) && defined(XK_VECTOR_BYTES)
constexpr int kVectorBytes = XK_VECTOR_BYTES, kRegisters = 32;
static_assert(kVectorBytes == 32);
#elif defined(__AVX512F__)
#define XK_512
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
  typedef T unaligned __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
};

template <class T>
constexpr int VL = kVectorBytes / int(sizeof(T));
template <class T>
using V = typename VectorOf<T, kVectorBytes>::type;

typedef typename VectorOf<int32_t, kVectorBytes>::type VI32;
typedef typename VectorOf<uint32_t, kVectorBytes>::type VU32;
XK_INLINE int itemsize(int dtype) { return dtype == XK_F64 ? 8 : dtype == XK_F32 ? 4 : 2; }

template <class T>
XK_INLINE V<T> broadcast(T x) {
  return x - V<T>{};  // compiles to a broadcast; 0 + x may not, since it turns -0 into 0
}

XK_INLINE V<float> load(const float* p) { return *(const typename VectorOf<float, kVectorBytes>::unaligned*)p; }
XK_INLINE V<double> load(const double* p) { return *(const typename VectorOf<double, kVectorBytes>::unaligned*)p; }
XK_INLINE void store(float* p, V<float> x) { *(typename VectorOf<float, kVectorBytes>::unaligned*)p = x; }
XK_INLINE void store(double* p, V<double> x) { *(typename VectorOf<double, kVectorBytes>::unaligned*)p = x; }
// The first n lanes (0 < n <= VL); the other lanes are zero on load, and are not written on store.
#if defined(XK_512)
XK_INLINE V<float> load(const float* p, int n) { return (V<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
XK_INLINE V<double> load(const double* p, int n) {
  return (V<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
XK_INLINE void store(float* p, V<float> x, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x); }
XK_INLINE void store(double* p, V<double> x, int n) { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)x); }
#elif defined(__AVX512F__)
XK_INLINE V<float> load(const float* p, int n) { return (V<float>)_mm256_maskz_loadu_ps(__mmask8((1u << n) - 1), p); }
XK_INLINE V<double> load(const double* p, int n) {
  return (V<double>)_mm256_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
XK_INLINE void store(float* p, V<float> x, int n) { _mm256_mask_storeu_ps(p, __mmask8((1u << n) - 1), (__m256)x); }
XK_INLINE void store(double* p, V<double> x, int n) { _mm256_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m256d)x); }
#else
#if defined(__AVX2__)
XK_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
XK_INLINE V<float> load(const float* p, int n) { return (V<float>)_mm256_maskload_ps(p, first_lanes(n)); }
XK_INLINE void store(float* p, V<float> x, int n) { _mm256_maskstore_ps(p, first_lanes(n), (__m256)x); }
#else
XK_INLINE V<float> load(const float* p, int n) {
  V<float> x = {};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
XK_INLINE void store(float* p, V<float> x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x[i];
}
#endif
XK_INLINE V<double> load(const double* p, int n) {
  V<double> x = {};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
XK_INLINE void store(double* p, V<double> x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x[i];
}
#endif

// Shuffles by constant lane indices: XK_SHUFFLE(a, b, f(L)...), with L the lane indices of a FirstLanes pack.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define XK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef XK_SHUFFLE
#define XK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Index<T>{__VA_ARGS__})
#endif

template <int Bytes>
struct IntOf;
template <>
struct IntOf<4> {
  typedef int32_t type;
};
template <>
struct IntOf<8> {
  typedef int64_t type;
};
template <class T>
using Index = typename VectorOf<typename IntOf<sizeof(T)>::type, kVectorBytes>::type;

template <int... I>
struct Lanes {};
template <int N, int... I>
struct FirstLanes : FirstLanes<N - 1, N - 1, I...> {};
template <int... I>
struct FirstLanes<0, I...> {
  typedef Lanes<I...> type;
};

// Swaps the off-diagonal halves, D lanes each, of two rows D apart; log2(VL) rounds transpose a square of registers.
template <class T, int D, int... L>
XK_INLINE void swap_halves(V<T>& a, V<T>& b, Lanes<L...>) {
  V<T> low = XK_SHUFFLE(a, b, ((L & D) ? L - D + VL<T> : L)...);
  b = XK_SHUFFLE(a, b, ((L & D) ? L + VL<T> : L + D)...);
  a = low;
}
template <class T, int D = VL<T> / 2>
XK_INLINE void transpose_registers(V<T> (&x)[VL<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < VL<T>; ++i)
    if (!(i & D)) swap_halves<T, D>(x[i], x[i + D], typename FirstLanes<VL<T>>::type{});
  if constexpr (D > 1) transpose_registers<T, D / 2>(x);
}

template <class T>
XK_INLINE V<T> max(V<T> a, V<T> b) {
  return b > a ? b : a;
}

// x min(max(x + 3, 0), 6) / 6
template <class T>
XK_INLINE V<T> hard_swish(V<T> x) {
  V<T> gate = max<T>(x + T(3), V<T>{});
  return x * (gate > T(6) ? broadcast(T(6)) : gate) * T(1.0 / 6);
}

template <class T, int D, int... L>
XK_INLINE V<T> add_rotated(V<T> x, Lanes<L...>) {
  return x + XK_SHUFFLE(x, x, ((L + D) % VL<T>)...);
}
// Sums by halves: a chain of additions would take longer than everything else that is done with a short row.
template <class T, int D = VL<T> / 2>
XK_INLINE T sum_lanes(V<T> x) {
  x = add_rotated<T, D>(x, typename FirstLanes<VL<T>>::type{});
  if constexpr (D > 1) return sum_lanes<T, D / 2>(x);
  return x[0];
}

template <class T, int D, int... L>
XK_INLINE V<T> max_rotated(V<T> x, Lanes<L...>) {
  return max<T>(x, XK_SHUFFLE(x, x, ((L + D) % VL<T>)...));
}
template <class T, int D = VL<T> / 2>
XK_INLINE T max_lanes(V<T> x) {
  x = max_rotated<T, D>(x, typename FirstLanes<VL<T>>::type{});
  if constexpr (D > 1) return max_lanes<T, D / 2>(x);
  return x[0];
}

// Lane i is the sum of the lanes of x[i]; x is overwritten.
template <class T, int D = VL<T> / 2>
XK_INLINE V<T> sum_each(V<T> (&x)[VL<T>]) {
#pragma GCC unroll 8
  for (int i = 0; i < D; ++i) {
    swap_halves<T, D>(x[i], x[i + D], typename FirstLanes<VL<T>>::type{});
    x[i] += x[i + D];
  }
  if constexpr (D > 1) return sum_each<T, D / 2>(x);
  return x[0];
}

// exp(x) for x <= 0 (softmax after subtracting the maximum): 2^k * p(r), |r| <= ln2 / 2, within 1 ulp. NaN stays NaN;
// the result is 0 where it would be below the smallest normal number.
XK_INLINE V<float> exp_nonpositive(V<float> x) {
  const float lowest = -87.33654f;
  V<float> clamped = x < lowest ? broadcast(lowest) : x;
  V<float> shifted = clamped * 1.44269504f + 12582912.f;  // rounds x / ln2 to an integer, in the low mantissa bits
  V<float> k = shifted - 12582912.f;
  V<float> r = clamped - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  V<float> p = r * 1.3981999507e-3f + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  V<float> scale = (V<float>)(((VI32)shifted << 23) + (127 << 23));
  V<float> y = p * scale;
  return x < lowest ? broadcast(0.f) : y;
}
XK_INLINE V<double> exp_nonpositive(V<double> x) {
  V<double> y;
  for (int i = 0; i < VL<double>; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}

template <class T>
XK_INLINE V<T> sqrt(V<T> x) {
  V<T> y;
  for (int i = 0; i < VL<T>; ++i)
    y[i] = sizeof(T) == 4 ? __builtin_sqrtf(float(x[i])) : T(__builtin_sqrt(double(x[i])));
  return y;
}

}  // namespace XK_LEVEL
}  // namespace xk
