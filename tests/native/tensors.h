// Tensors of every storage type and layout, and the comparison of results. No code is shared with the library.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/include/xformer_kernels.h"

inline double random_number() {  // in (-1, 1), the same sequence in each run
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(int64_t(state) >> 11) / double(int64_t(1) << 52);
}

// (batch, heads, rows, columns) in double, for the naive loops.
struct Array {
  int64_t B, H, N, D;
  std::vector<double> data;
  Array(int64_t B = 0, int64_t H = 0, int64_t N = 0, int64_t D = 0) : B(B), H(H), N(N), D(D), data(B * H * N * D) {}
  double& operator()(int64_t b, int64_t h, int64_t n, int64_t d) { return data[((b * H + h) * N + n) * D + d]; }
  double operator()(int64_t b, int64_t h, int64_t n, int64_t d) const { return data[((b * H + h) * N + n) * D + d]; }
};

struct Type {
  const char* name;
  int size, bits, lowest;  // bytes; significand bits including the leading one; exponent of the smallest number
};
inline const Type& type(int dtype) {
  static const Type types[] = {{"f32", 4, 24, -149}, {"f64", 8, 53, -1074}, {"bf16", 2, 8, -133}, {"f16", 2, 11, -24}};
  return types[dtype];
}
inline int accumulated(int dtype) { return dtype == XK_F64 ? XK_F64 : XK_F32; }

inline double decode(const uint8_t* p, int dtype) {
  uint16_t half;
  uint32_t word;
  float single;
  double number;
  if (dtype == XK_F64) return memcpy(&number, p, 8), number;
  if (dtype == XK_F32) return memcpy(&single, p, 4), double(single);
  memcpy(&half, p, 2);
  if (dtype == XK_BF16) return word = uint32_t(half) << 16, memcpy(&single, &word, 4), double(single);
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(fraction + 1024, exponent - 25);
  return half >> 15 ? -magnitude : magnitude;
}
inline void encode(uint8_t* p, int dtype, double x) {
  if (dtype == XK_F64) return void(memcpy(p, &x, 8));
  if (dtype == XK_F32) {
    const float single = float(x);
    return void(memcpy(p, &single, 4));
  }
  int exponent;
  std::frexp(x, &exponent);
  const int step = std::max(exponent - type(dtype).bits, type(dtype).lowest);
  const double rounded = std::isnan(x) ? x : std::ldexp(std::nearbyint(std::ldexp(x, -step)), step);
  uint16_t half;
  if (dtype == XK_BF16) {
    const float single = float(rounded);
    uint32_t word;
    memcpy(&word, &single, 4);
    half = uint16_t(word >> 16);
  } else {
    const double magnitude = std::fabs(rounded);
    std::frexp(magnitude, &exponent);
    const int biased = std::max(exponent + 14, 0);
    const int fraction = biased ? int(std::ldexp(magnitude, 25 - biased)) - 1024 : int(std::ldexp(magnitude, 24));
    half = std::isnan(x) ? 0x7e00 : uint16_t((std::signbit(rounded) ? 0x8000 : 0) | biased << 10 | fraction);
  }
  memcpy(p, &half, 2);
}

// kPacked: token-major, with the heads of a token adjacent. kPadded: the same with gaps. kChannelMajor: unit stride
// over tokens, as in images. kStrided: no unit stride. kHeadsFirst: for matrices that the C API writes.
enum Layout { kPacked, kPadded, kChannelMajor, kStrided, kLayouts, kHeadsFirst = kLayouts };

struct Tensor {
  int64_t B, H, N, D, sb, sh, sn, sd;
  int dtype;
  std::vector<uint8_t> bytes;

  // filled with NaN
  Tensor(int64_t B, int64_t H, int64_t N, int64_t D, int dtype, Layout layout = kPacked)
      : B(B), H(H), N(N), D(D), dtype(dtype) {
    const int64_t gap = layout == kPadded ? 3 : 0;
    if (layout == kChannelMajor)
      sn = 1, sd = N + 2, sh = D * sd, sb = H * sh;
    else if (layout == kHeadsFirst)
      sd = 1, sn = D, sh = N * sn, sb = H * sh;
    else if (layout == kStrided)
      sd = 2, sn = 2 * D + 1, sh = N * sn, sb = H * sh;
    else
      sd = 1, sh = D + gap, sn = H * sh + gap, sb = N * sn;
    bytes.resize((B * sb + 64) * type(dtype).size);
    for (size_t i = 0; i < bytes.size(); i += type(dtype).size) encode(&bytes[i], dtype, NAN);
  }
  uint8_t* at(int64_t b, int64_t h, int64_t n, int64_t d) {
    return &bytes[(b * sb + h * sh + n * sn + d * sd) * type(dtype).size];
  }
  template <class F>
  void each(F f) const {
    for (int64_t b = 0; b < B; ++b)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t n = 0; n < N; ++n)
          for (int64_t d = 0; d < D; ++d) f(b, h, n, d);
  }
  Tensor& randomise() {
    each([&](auto... i) { encode(at(i...), dtype, random_number()); });
    return *this;
  }
  Array values() {
    Array a(B, H, N, D);
    each([&](auto... i) { a(i...) = decode(at(i...), dtype); });
    return a;
  }
  xk_tensor c() { return {bytes.data(), sb, sh, sn, sd, dtype}; }
  xk_per_head per_head() { return {bytes.data(), sd, dtype}; }
};

// True for tokens that are kept. With a mask, every third token is masked.
struct Mask {
  bool present;
  int64_t N;
  std::vector<uint8_t> data;
  Mask(bool present, int64_t B, int64_t N) : present(present), N(N), data(2 * B * N + 1) {
    for (int64_t i = 0; i < B * N; ++i) data[2 * i] = i % 3 != 1;
  }
  bool operator()(int64_t b, int64_t n) const { return !present || data[2 * (b * N + n)]; }
  xk_mask c() const { return {present ? data.data() : nullptr, 2 * N, 2}; }
  Array applied(Array x) const {
    for (int64_t b = 0; b < x.B; ++b)
      for (int64_t h = 0; h < x.H; ++h)
        for (int64_t n = 0; n < x.N; ++n)
          for (int64_t d = 0; d < x.D && !(*this)(b, n); ++d) x(b, h, n, d) = 0;
    return x;
  }
};

inline std::string describe(const char* format, ...) {
  char text[300];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

struct Judge {
  int failures = 0, compared = 0;
  double worst = 0;    // largest ratio of error to tolerance
  bool pairs = false;  // whether products use bf16 pairs, with maps rounded to bf16

  // The tolerance is the rounding error of the result's type plus that of sums in the accumulate type, which is
  // relative to the largest term.
  void near(Tensor& got, const Array& expected, const std::string& what, int computed, double terms = 1) {
    double largest = terms;
    for (double x : expected.data) largest = std::max(largest, std::fabs(x));
    const double sums =
        pairs && computed == XK_BF16 ? std::ldexp(1, -7) : std::ldexp(32, -type(accumulated(computed)).bits);
    bool said = false;
    got.each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
      const double x = decode(got.at(b, h, n, d), got.dtype), y = expected(b, h, n, d);
      const double tolerance =
          std::ldexp(std::fabs(y), -type(got.dtype).bits) + sums * largest + std::ldexp(1, type(got.dtype).lowest);
      worst = std::max(worst, std::fabs(x - y) / tolerance);
      ++compared;
      if (std::fabs(x - y) <= tolerance || said) return;
      said = true, ++failures;
      printf("%s [%d,%d,%d,%d]: got %.9g, expected %.9g, tolerance %.3g\n", what.c_str(), int(b), int(h), int(n),
             int(d), x, y, tolerance);
    });
    untouched(got, what);
  }
  // Memory between the elements of a result must not be written: it stays NaN.
  void untouched(Tensor got, const std::string& what) {
    got.each([&](auto... i) { encode(got.at(i...), got.dtype, NAN); });
    for (size_t i = 0; i < got.bytes.size(); i += type(got.dtype).size)
      if (!std::isnan(decode(&got.bytes[i], got.dtype))) {
        ++failures;
        printf("%s: written outside the result, at element %d of its memory\n", what.c_str(),
               int(i / type(got.dtype).size));
        return;
      }
  }
  void status(int got, int expected, const std::string& what) {
    if (got == expected) return;
    ++failures;
    printf("%s: status %d, expected %d\n", what.c_str(), got, expected);
  }
};
