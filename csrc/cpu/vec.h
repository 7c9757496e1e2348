// One vector register of T, written with the vector extensions of GCC and Clang, so that the same source compiles for
// every instruction level and architecture. Storage types (bf16, f16) are widened on load and rounded to nearest even
// on store. Intrinsics are used, where the level has them, for partial loads and stores, for conversions of 16-bit
// types and for products of bf16 pairs.
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

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

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
typedef typename VectorOf<uint16_t, kVectorBytes / 2>::type VU16;
typedef typename VectorOf<uint16_t, kVectorBytes / 2>::unaligned VU16u;

XK_INLINE int itemsize(int dtype) { return dtype == XK_F64 ? 8 : dtype == XK_F32 ? 4 : 2; }

XK_INLINE float widen(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
XK_INLINE float widen(float x) { return x; }
XK_INLINE double widen(double x) { return x; }

XK_INLINE float widen(f16 x) {
  // Shift exponent and mantissa into place, then scale by 2^112: exact for subnormals. Inf and NaN are handled after.
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float scaled = __builtin_bit_cast(float, magnitude) * __builtin_bit_cast(float, uint32_t(0x77800000));
  uint32_t bits = __builtin_bit_cast(uint32_t, scaled);
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  return __builtin_bit_cast(float, bits | uint32_t(x.bits & 0x8000) << 16);
}

XK_INLINE void narrow(float* out, float x) { *out = x; }
XK_INLINE void narrow(double* out, double x) { *out = x; }
XK_INLINE void narrow(bf16* out, float x) {
  uint32_t u = __builtin_bit_cast(uint32_t, x);
  out->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
XK_INLINE void narrow(f16* out, float x) {
  uint32_t u = __builtin_bit_cast(uint32_t, x), sign = (u >> 16) & 0x8000, m = u & 0x7fffffff;
  uint32_t h;
  if (m > 0x7f800000)
    h = 0x7e00;  // NaN
  else if (m >= 0x477ff000)
    h = 0x7c00;  // rounds to infinity
  else if (m < 0x38800000) {
    // Subnormal: adding 0.5 aligns the mantissa, so the hardware does the rounding.
    float aligned = __builtin_bit_cast(float, m) + 0.5f;
    h = __builtin_bit_cast(uint32_t, aligned) - 0x3f000000;
  } else
    h = (m + 0xc8000fff + ((m >> 13) & 1)) >> 13;
  out->bits = uint16_t(h | sign);
}

template <class T>
XK_INLINE V<T> broadcast(T x) {
  return x - V<T>{};  // compiles to a broadcast; 0 + x may not, since it turns -0 into 0
}

XK_INLINE V<float> load(const float* p) { return *(const typename VectorOf<float, kVectorBytes>::unaligned*)p; }
XK_INLINE V<double> load(const double* p) { return *(const typename VectorOf<double, kVectorBytes>::unaligned*)p; }
// Convert 16-bit lanes to and from the low halves of 32-bit lanes (GCC 12 splits the generic conversion in two).
#if defined(XK_512)
XK_INLINE VU32 extend(VU16 x) { return (VU32)_mm512_cvtepu16_epi32((__m256i)x); }
XK_INLINE VU16 truncate(VU32 x) { return (VU16)_mm512_cvtepi32_epi16((__m512i)x); }
#else
XK_INLINE VU32 extend(VU16 x) { return __builtin_convertvector(x, VU32); }
XK_INLINE VU16 truncate(VU32 x) { return __builtin_convertvector(x, VU16); }
#endif
XK_INLINE V<float> widen_bf16(VU16 x) { return (V<float>)(extend(x) << 16); }
XK_INLINE V<float> load(const bf16* p) { return widen_bf16(*(const VU16u*)p); }

// Pairs of bf16 are stored as the bits of the 32-bit lanes of V<float>. kPairs: the level has the instruction that adds
// the products of both elements of a pair to a float, which doubles the rate of products.
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(XK_VECTOR_BYTES)
constexpr bool kPairs = true;
XK_INLINE V<float> add_product_of_pairs(V<float> sum, V<float> a, V<float> b) {
  return (V<float>)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
}
#else
constexpr bool kPairs = false;
XK_INLINE V<float> add_product_of_pairs(V<float> sum, V<float>, V<float>) { return sum; }
#endif
XK_INLINE VU32 bits(const bf16* p) { return extend(*(const VU16u*)p); }
XK_INLINE V<float> first_of_pair(VU32 x) { return (V<float>)(x << 16); }
XK_INLINE V<float> second_of_pair(VU32 x) { return (V<float>)(x & 0xffff0000u); }

XK_INLINE void store(float* p, V<float> x) { *(typename VectorOf<float, kVectorBytes>::unaligned*)p = x; }
XK_INLINE void store(double* p, V<double> x) { *(typename VectorOf<double, kVectorBytes>::unaligned*)p = x; }
XK_INLINE VU16 narrow_bf16(V<float> x) {
  VU32 u = (VU32)x;
  VU32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  VU32 nan = (VU32)(x != x);
  return truncate((rounded & ~nan) | (nan & 0x7fc0));
}
XK_INLINE void store(bf16* p, V<float> x) { *(VU16u*)p = narrow_bf16(x); }

#if defined(XK_512)
XK_INLINE V<float> load(const f16* p) { return (V<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
XK_INLINE void store(f16* p, V<float> x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
XK_INLINE V<float> load(const f16* p) { return (V<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
XK_INLINE void store(f16* p, V<float> x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
XK_INLINE V<float> load(const f16* p) {
  V<float> x;
  for (int i = 0; i < VL<float>; ++i) x[i] = widen(p[i]);
  return x;
}
XK_INLINE void store(f16* p, V<float> x) {
  for (int i = 0; i < VL<float>; ++i) narrow(p + i, x[i]);
}
#endif

// The first n lanes (0 < n <= VL); the other lanes are zero on load, and are not written on store.
#if defined(XK_512)
XK_INLINE V<float> load(const float* p, int n) { return (V<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
XK_INLINE V<double> load(const double* p, int n) {
  return (V<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
XK_INLINE VU32 bits(const bf16* p, int n) {
  return extend((VU16)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
}
XK_INLINE V<float> load(const bf16* p, int n) { return first_of_pair(bits(p, n)); }
XK_INLINE V<float> load(const f16* p, int n) {
  return (V<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
}
XK_INLINE void store(float* p, V<float> x, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x); }
XK_INLINE void store(double* p, V<double> x, int n) { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)x); }
XK_INLINE void store(bf16* p, V<float> x, int n) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)narrow_bf16(x));
}
XK_INLINE void store(f16* p, V<float> x, int n) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1),
                           _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX512F__)
XK_INLINE V<float> load(const float* p, int n) { return (V<float>)_mm256_maskz_loadu_ps(__mmask8((1u << n) - 1), p); }
XK_INLINE V<double> load(const double* p, int n) {
  return (V<double>)_mm256_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
XK_INLINE VU32 bits(const bf16* p, int n) { return extend((VU16)_mm_maskz_loadu_epi16(__mmask8((1u << n) - 1), p)); }
XK_INLINE V<float> load(const bf16* p, int n) { return first_of_pair(bits(p, n)); }
XK_INLINE V<float> load(const f16* p, int n) {
  return (V<float>)_mm256_cvtph_ps(_mm_maskz_loadu_epi16(__mmask8((1u << n) - 1), p));
}
XK_INLINE void store(float* p, V<float> x, int n) { _mm256_mask_storeu_ps(p, __mmask8((1u << n) - 1), (__m256)x); }
XK_INLINE void store(double* p, V<double> x, int n) { _mm256_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m256d)x); }
XK_INLINE void store(bf16* p, V<float> x, int n) {
  _mm_mask_storeu_epi16(p, __mmask8((1u << n) - 1), (__m128i)narrow_bf16(x));
}
XK_INLINE void store(f16* p, V<float> x, int n) {
  _mm_mask_storeu_epi16(p, __mmask8((1u << n) - 1), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
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
template <class S>
XK_INLINE V<float> load(const S* p, int n) {
  alignas(kVectorBytes) S whole[VL<float>] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}
XK_INLINE VU32 bits(const bf16* p, int n) {
  alignas(kVectorBytes) bf16 whole[VL<float>] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return bits(whole);
}
XK_INLINE V<double> load(const double* p, int n) {
  V<double> x = {};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
template <class S>
XK_INLINE void store(S* p, V<float> x, int n) {
  alignas(kVectorBytes) S whole[VL<float>];
  store(whole, x);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
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

// Calls f with a null pointer to the storage type of `dtype`, for the dtypes that are computed in T.
template <class T, class F>
XK_INLINE void with_storage(int dtype, F f) {
  if constexpr (sizeof(T) == sizeof(double)) {
    f((double*)nullptr);
  } else {
    if (dtype == XK_F32)
      f((float*)nullptr);
    else if (dtype == XK_BF16)
      f((bf16*)nullptr);
    else
      f((f16*)nullptr);
  }
}

// The same for every dtype.
template <class F>
XK_INLINE void with_any_storage(int dtype, F f) {
  if (dtype == XK_F64)
    f((double*)nullptr);
  else
    with_storage<float>(dtype, f);
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
