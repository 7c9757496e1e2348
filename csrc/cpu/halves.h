// Storage of 16 bits: bf16 and f16 are widened to float on load and rounded to nearest even on store. Intrinsics are
// used, where the level has them, for conversions, for partial loads and stores, and for products of bf16 pairs.
#pragma once

#include "vec.h"

namespace xk {
namespace XK_LEVEL {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

typedef typename VectorOf<uint16_t, kVectorBytes / 2>::type VU16;
typedef typename VectorOf<uint16_t, kVectorBytes / 2>::unaligned VU16u;

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

// Convert 16-bit lanes to and from the low halves of 32-bit lanes, which are below 65536. GCC 12 splits the generic
// conversions in two.
#if defined(XK_512)
XK_INLINE VU32 extend(VU16 x) { return (VU32)_mm512_cvtepu16_epi32((__m256i)x); }
XK_INLINE VU16 truncate(VU32 x) { return (VU16)_mm512_cvtepi32_epi16((__m512i)x); }
#elif defined(__AVX2__)
XK_INLINE VU32 extend(VU16 x) { return (VU32)_mm256_cvtepu16_epi32((__m128i)x); }
XK_INLINE VU16 truncate(VU32 x) {
  return (VU16)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
}
#else
XK_INLINE VU32 extend(VU16 x) { return __builtin_convertvector(x, VU32); }
XK_INLINE VU16 truncate(VU32 x) { return __builtin_convertvector(x, VU16); }
#endif

XK_INLINE V<float> widen_lanes(VU16 x, bf16) { return (V<float>)(extend(x) << 16); }
XK_INLINE VU16 narrow_lanes(V<float> x, bf16) {
  const VU32 u = (VU32)x, nan = VU32{} + 0x7fc0;
  return truncate(x != x ? nan : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

#if defined(XK_512)
XK_INLINE V<float> widen_lanes(VU16 x, f16) { return (V<float>)_mm512_cvtph_ps((__m256i)x); }
XK_INLINE VU16 narrow_lanes(V<float> x, f16) {
  return (VU16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
XK_INLINE V<float> widen_lanes(VU16 x, f16) { return (V<float>)_mm256_cvtph_ps((__m128i)x); }
XK_INLINE VU16 narrow_lanes(V<float> x, f16) { return (VU16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
XK_INLINE V<float> widen_lanes(VU16 x, f16) {
  V<float> y;
  for (int i = 0; i < VL<float>; ++i) y[i] = widen(f16{x[i]});
  return y;
}
XK_INLINE VU16 narrow_lanes(V<float> x, f16) {
  VU16 y;
  for (int i = 0; i < VL<float>; ++i) {
    f16 narrowed;
    narrow(&narrowed, x[i]);
    y[i] = narrowed.bits;
  }
  return y;
}
#endif

XK_INLINE VU16 lanes_of(const void* p) { return *(const VU16u*)p; }
XK_INLINE void put_lanes(void* p, VU16 x) { *(VU16u*)p = x; }

// The first n lanes of 16 bits (0 < n <= VL).
#if defined(XK_512)
XK_INLINE VU16 lanes_of(const void* p, int n) { return (VU16)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p); }
XK_INLINE void put_lanes(void* p, VU16 x, int n) { _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)x); }
#elif defined(__AVX512F__)
XK_INLINE VU16 lanes_of(const void* p, int n) { return (VU16)_mm_maskz_loadu_epi16(__mmask8((1u << n) - 1), p); }
XK_INLINE void put_lanes(void* p, VU16 x, int n) { _mm_mask_storeu_epi16(p, __mmask8((1u << n) - 1), (__m128i)x); }
#else
// Four lanes are one integer. For more than four, a second integer is read or written that ends at lane n and overlaps
// the first one.
typedef uint64_t FourLanes __attribute__((aligned(2), may_alias));
typedef uint32_t TwoLanes __attribute__((aligned(2), may_alias));
typedef typename VectorOf<uint64_t, kVectorBytes / 2>::type Fours;  // as many lanes as VU16
constexpr int kLastFour = VL<float> / 4 - 1;

XK_INLINE VU16 lanes_of(const void* from, int n) {
  const uint16_t* p = (const uint16_t*)from;
  Fours x = {};
  if (n >= 4) {
    x[0] = *(const FourLanes*)p;
    if (n > 4) x[kLastFour] = *(const FourLanes*)(p + n - 4) >> 16 * (8 - n);
  } else {
    uint64_t few = n & 1 ? uint64_t(p[n - 1]) << 16 * (n - 1) : 0;
    if (n >= 2) few |= *(const TwoLanes*)p;
    x[0] = few;
  }
  return (VU16)x;
}
XK_INLINE void put_lanes(void* to, VU16 lanes, int n) {
  uint16_t* p = (uint16_t*)to;
  const Fours x = (Fours)lanes;
  if (n >= 4) {
    *(FourLanes*)p = x[0];
    if (n > 4) *(FourLanes*)(p + n - 4) = n == 8 ? x[kLastFour] : x[0] >> 16 * (n - 4) | x[kLastFour] << 16 * (8 - n);
  } else {
    if (n >= 2) *(TwoLanes*)p = uint32_t(x[0]);
    if (n & 1) p[n - 1] = uint16_t(x[0] >> 16 * (n - 1));
  }
}
#endif

// S: bf16 or f16
template <class S>
XK_INLINE V<float> load(const S* p) {
  return widen_lanes(lanes_of(p), S{});
}
template <class S>
XK_INLINE V<float> load(const S* p, int n) {
  return widen_lanes(lanes_of(p, n), S{});
}
template <class S>
XK_INLINE void store(S* p, V<float> x) {
  put_lanes(p, narrow_lanes(x, S{}));
}
template <class S>
XK_INLINE void store(S* p, V<float> x, int n) {
  put_lanes(p, narrow_lanes(x, S{}), n);
}

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
XK_INLINE VU32 bits(const bf16* p) { return extend(lanes_of(p)); }
XK_INLINE VU32 bits(const bf16* p, int n) { return extend(lanes_of(p, n)); }
XK_INLINE V<float> first_of_pair(VU32 x) { return (V<float>)(x << 16); }
XK_INLINE V<float> second_of_pair(VU32 x) { return (V<float>)(x & 0xffff0000u); }

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

}  // namespace XK_LEVEL
}  // namespace xk
