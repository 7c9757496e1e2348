// nvcuda::wmma: 16x16x16 of __half and __nv_bfloat16, 16x16x8 of tf32. A fragment starts as NaN, and which lane holds
// which element is not what it is on any GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace nvcuda::wmma {

using xk::emulation::Where;

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32;
}

template <class T>
struct storage {
  using type = T;
};
template <>
struct storage<precision::tf32> {
  using type = float;
};

template <class T>
constexpr bool supported(int m, int n, int k) {
  return m == 16 && n == 16 && (std::is_same_v<T, precision::tf32> ? k == 8 : std::is_same_v<T, float> || k == 16);
}

template <class Use, int m, int n, int k, class T, class Layout = void>
struct fragment {
  static_assert(supported<T>(m, n, k));
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, precision::tf32> ||
                (std::is_same_v<T, float> && std::is_same_v<Use, accumulator>));
  using element_type = T;
  using storage_element_type = typename storage<T>::type;
  static constexpr unsigned rows = std::is_same_v<Use, matrix_b> ? k : m;
  static constexpr unsigned columns = std::is_same_v<Use, matrix_a> ? k : n;
  static constexpr int num_elements = (int)(rows * columns / 32);
  storage_element_type x[num_elements];
  fragment() { memset(x, 0xff, sizeof x); }
};

inline float __float_to_tf32(float value) {  // to nearest, ties away from zero: cvt.rna
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000) != 0x7f800000) bits += 0x1000;
  if (value == value) bits &= ~0x1fffu;
  memcpy(&value, &bits, 4);
  return value;
}

template <class Fragment>
void fill_fragment(Fragment& f, const typename Fragment::storage_element_type& value) {
  for (auto& x : f.x) x = value;
}

template <class Fragment, class T>
bool arrive_with(const char* what, Fragment& f, const T* p, unsigned stride, bool rows_in_memory, Where where) {
  using namespace xk::emulation;
  if ((uintptr_t)p % 32)
    fail("%s at %s:%u: address %p, which is not a multiple of 32 bytes", what, where.file_name(), where.line(),
         (const void*)p);
  if (stride * sizeof(T) % 16)
    fail("%s at %s:%u: stride of %u elements, which is not a multiple of 16 bytes", what, where.file_name(),
         where.line(), stride);
  const int64_t lines = rows_in_memory ? f.rows : f.columns, length = rows_in_memory ? f.columns : f.rows;
  check_span(what, p, ((lines - 1) * (int64_t)stride + length) * (int64_t)sizeof(T), where);
  return arrive(what, (uint64_t)(uintptr_t)p * 31 + stride, const_cast<void*>(static_cast<const void*>(f.x)), where);
}

template <class Fragment, class T>
void load(Fragment& f, const T* p, unsigned stride, bool rows_in_memory, Where where) {
  if (!arrive_with("load_matrix_sync", f, p, stride, rows_in_memory, where)) return;
  T matrix[f.rows * f.columns];
  for (unsigned r = 0; r < f.rows; ++r)
    for (unsigned c = 0; c < f.columns; ++c)
      matrix[r * f.columns + c] = rows_in_memory ? p[(size_t)r * stride + c] : p[(size_t)c * stride + r];
  xk::emulation::scatter(matrix, f.rows * f.columns, sizeof(T));
  xk::emulation::leave();
}

template <class Use, int m, int n, int k, class T, class Layout>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& f, const typename storage<T>::type* p, unsigned stride,
                      Where where = Where::current()) {
  static_assert(!std::is_same_v<Use, accumulator>, "accumulators are loaded with a layout");
  load(f, p, stride, std::is_same_v<Layout, row_major>, where);
}

template <int m, int n, int k>
void load_matrix_sync(fragment<accumulator, m, n, k, float>& f, const float* p, unsigned stride, layout_t layout,
                      Where where = Where::current()) {
  load(f, p, stride, layout == mem_row_major, where);
}

template <int m, int n, int k>
void store_matrix_sync(float* p, const fragment<accumulator, m, n, k, float>& f, unsigned stride, layout_t layout,
                       Where where = Where::current()) {
  const bool rows_in_memory = layout == mem_row_major;
  if (!arrive_with("store_matrix_sync", f, p, stride, rows_in_memory, where)) return;
  float matrix[f.rows * f.columns];
  xk::emulation::gather(matrix, f.rows * f.columns, sizeof(float));
  for (unsigned r = 0; r < f.rows; ++r)
    for (unsigned c = 0; c < f.columns; ++c)
      p[rows_in_memory ? (size_t)r * stride + c : (size_t)c * stride + r] = matrix[r * f.columns + c];
  xk::emulation::leave();
}

template <int m, int n, int k, class T, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, m, n, k, float>& d, const fragment<matrix_a, m, n, k, T, LayoutA>& a,
              const fragment<matrix_b, m, n, k, T, LayoutB>& b, const fragment<accumulator, m, n, k, float>& c,
              Where where = Where::current()) {
  using xk::emulation::Multiplicand;
  constexpr Multiplicand type = std::is_same_v<T, __half>          ? Multiplicand::half
                                : std::is_same_v<T, __nv_bfloat16> ? Multiplicand::bfloat16
                                                                   : Multiplicand::tf32;
  xk::emulation::multiply(type, a.x, b.x, c.x, d.x, where);
}

}  // namespace nvcuda::wmma
