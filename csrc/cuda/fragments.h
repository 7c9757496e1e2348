// Register fragments (operands and accumulators) of mma.sync. Never run on a GPU: compiled by nvcc, and tested in the
// emulation of tests/cuda_kernels/shim.
//
// The features and tokens of a product may be in any order, as long as both operands use the same order. In the orders
// of fragment_gram.h and fragment_mix.h, vector loads of 4 to 16 bytes of a token directly yield the registers of a
// fragment: tokens are not staged in shared memory.
//
// A lane of a warp has the indices g = lane / 4 and t = lane % 4: groupID and threadID_in_group of the PTX ISA manual.
#pragma once

#include <type_traits>

#include "numbers.h"

namespace xk::cuda {

// d += a b, or d = a b if kFirst. a is 16 x 16 (bf16, fp16) or 16 x 8 (float, reduced to tf32); b has 8 columns; d is
// 16 x 8.
#ifdef XK_EMULATED
template <class T, bool kFirst = false>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
         emulation::Where where = emulation::Where::current()) {
  if (kFirst) d[0] = d[1] = d[2] = d[3] = 0;
  using emulation::Multiplicand;
  constexpr Multiplicand type = std::is_same_v<T, Half>     ? Multiplicand::half
                                : std::is_same_v<T, BFloat> ? Multiplicand::bfloat16
                                                            : Multiplicand::tf32;
  emulation::multiply_registers(type, a, b0, b1, d, where);
}

// Predicated load and store of kWords registers in global memory.
template <int kWords>
void load_words(uint32_t* to, const char* from, bool there) {
  if (there) load_numbers<kWords>(to, reinterpret_cast<const uint32_t*>(from));
}
template <int kWords>
void store_words(char* to, const uint32_t* from, bool there) {
  if (there) load_numbers<kWords>(reinterpret_cast<uint32_t*>(to), from);
}
inline void load_fragment_words(uint32_t (&to)[4], const uint32_t* from) { load_numbers<4>(to, from); }
#else
template <class T, bool kFirst = false>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define XK_MMA(shape, type)                                                        \
  if constexpr (kFirst)                                                            \
    asm("mma.sync.aligned." shape ".row.col.f32." type "." type                    \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};" \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f)); \
  else                                                                             \
    asm("mma.sync.aligned." shape ".row.col.f32." type "." type                    \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, Half>) {
    XK_MMA("m16n8k16", "f16");
  } else if constexpr (std::is_same_v<T, BFloat>) {
    XK_MMA("m16n8k16", "bf16");
  } else {
    XK_MMA("m16n8k8", "tf32");
  }
#undef XK_MMA
}

// Predicated load: registers are unchanged if `there` is false. The data is not reused, so .cs marks it as evict-first.
template <int kWords>
__device__ __forceinline__ void load_words(uint32_t* to, const char* from, bool there) {
  if constexpr (kWords == 4)
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p ld.global.cs.v4.b32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(to[0]), "+r"(to[1]), "+r"(to[2]), "+r"(to[3])
                 : "l"(from), "r"((int)there));
  else if constexpr (kWords == 2)
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p ld.global.cs.v2.b32 {%0, %1}, [%2];}"
                 : "+r"(to[0]), "+r"(to[1])
                 : "l"(from), "r"((int)there));
  else
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.global.cs.b32 %0, [%1];}"
                 : "+r"(to[0])
                 : "l"(from), "r"((int)there));
}
// Load from shared memory; volatile, to prevent hoisting out of loops: the fragments of a whole map do not fit in
// registers.
__device__ __forceinline__ void load_fragment_words(uint32_t (&to)[4], const uint32_t* from) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"((uint32_t)__cvta_generic_to_shared(from)));
}
template <int kWords>
__device__ __forceinline__ void store_words(char* to, const uint32_t* from, bool there) {
  if constexpr (kWords == 4)
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.cs.v4.b32 [%4], {%0, %1, %2, %3};}"
                 :
                 : "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]), "l"(to), "r"((int)there)
                 : "memory");
  else if constexpr (kWords == 2)
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p st.global.cs.v2.b32 [%2], {%0, %1};}"
                 :
                 : "r"(from[0]), "r"(from[1]), "l"(to), "r"((int)there)
                 : "memory");
  else
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p st.global.cs.b32 [%1], %0;}"
                 :
                 : "r"(from[0]), "l"(to), "r"((int)there)
                 : "memory");
}
#endif

template <int kRows, int kWords>
__device__ __forceinline__ void clear_words(uint32_t (&x)[kRows][kWords]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int w = 0; w < kWords; ++w) x[i][w] = 0;
}

// Words per access of a lane that holds `words` 32-bit words of a token.
__host__ __device__ constexpr int piece_of(int words) { return words % 4 == 0 ? 4 : words % 2 == 0 ? 2 : 1; }

// Distribution of kFeatures features of a token over kLanes lanes. A lane holds kCount pieces of 4 to 16 bytes; piece r
// of each lane is adjacent in memory to piece r of the next lane.
template <class T, int kFeatures, int kLanes>
struct Pieces {
  static constexpr int kNumbers = kFeatures / kLanes, kInWord = 4 / (int)sizeof(T), kWords = kNumbers / kInWord;
  static constexpr int kPiece = piece_of(kWords), kCount = kWords / kPiece, kTogether = kPiece * kInWord;
  static_assert(kWords * kInWord * kLanes == kFeatures);

  // The feature index of the lane's number i.
  __host__ __device__ static constexpr int feature(int lane, int i) {
    return (i / kTogether * kLanes + lane) * kTogether + i % kTogether;
  }
  // Loads only the lane's pieces within the first `features` features.
  __device__ static __forceinline__ void load(uint32_t (&to)[kWords], const char* token, int lane, int features,
                                              bool there) {
#pragma unroll
    for (int r = 0; r < kCount; ++r)
      load_words<kPiece>(to + r * kPiece, token + r * kLanes * kPiece * 4,
                         there && feature(lane, r * kTogether) < features);
  }
  __device__ static __forceinline__ void store(char* token, const uint32_t (&from)[kWords], int lane, int features,
                                               bool there) {
#pragma unroll
    for (int r = 0; r < kCount; ++r)
      store_words<kPiece>(token + r * kLanes * kPiece * 4, from + r * kPiece,
                          there && feature(lane, r * kTogether) < features);
  }
};

// 3xTF32: x = hi + lo, and a product of floats becomes three tf32 products (lo * lo is dropped). Tensor cores use 11
// bits of hi and of lo. hi is x rounded to nearest as by cvt.rna.tf32, which takes twice as many instructions. If x is
// infinite or NaN, lo is NaN.
__device__ __forceinline__ void split_into_tf32(uint32_t x, uint32_t& hi, uint32_t& lo) {
  hi = (x + 0x1000) & 0xffffe000;
  lo = __float_as_uint(__uint_as_float(x) - __uint_as_float(hi));
}

// Number i of an array of T that is packed in words.
template <class T>
__device__ __forceinline__ float number_of(const uint32_t* words, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words[i]);
  } else if constexpr (std::is_same_v<T, BFloat>) {
    return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
  } else {
    alignas(4) T pair[2];
    load_numbers<2>(pair, reinterpret_cast<const T*>(&words[i / 2]));
    return widen(pair[i % 2]);
  }
}

template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float x, float y) {
  alignas(4) T pair[2] = {narrow<T>(x), narrow<T>(y)};
  uint32_t word;
  load_numbers<2>(reinterpret_cast<T*>(&word), pair);
  return word;
}

struct Lane {
  int warp, g, t;
  __device__ Lane() : warp((int)threadIdx.x / 32), g((int)threadIdx.x % 32 / 4), t((int)threadIdx.x % 4) {}
};

}  // namespace xk::cuda
