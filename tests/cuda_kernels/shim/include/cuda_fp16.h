// __half: conversions to nearest even, as the GPU's; no arithmetic.
#pragma once

#include <cuda_runtime.h>

struct __half {
  uint16_t bits;
};
struct __align__(4) __half2 {
  __half x, y;
};

__forceinline__ float __half2float(__half h) {
  const uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
  if (magnitude < 0x400) {  // subnormal: an integer of 2^-24
    const float value = (float)magnitude * 0x1p-24f;
    return sign ? -value : value;
  }
  uint32_t bits = sign | ((magnitude << 13) + ((magnitude < 0x7c00 ? 112u : 224u) << 23));
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

__forceinline__ __half __float2half_rn(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {0x7fff};
  if (bits >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};  // from 65520 on
  if (bits < 0x38800000) {                                     // subnormal: the addition rounds to an integer of 2^-24
    float shifted;
    memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    memcpy(&bits, &shifted, 4);
    return {(uint16_t)(sign | (bits - 0x3f000000))};
  }
  return {(uint16_t)(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13))};
}

inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
