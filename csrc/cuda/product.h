// Products of tiles in shared memory by all threads of a block, with accumulators in registers.
//
//   Product<T, M, N, kThreads, kTransposed> y;         M x N accumulators, initialised to 0
//   y.multiply(a, lda, b, ldb, depth, rows);           y += a b, or a^T b if kTransposed
//   y.store(out, ld);                                  to shared memory; all threads must take part
//
// b is depth x N. a is M x depth, of which only the first `rows` rows are used, or depth x M if kTransposed. If M x N
// is too small to occupy all threads, the depth is split over groups of threads (split-K), and store adds the sums of
// the groups in a fixed order.
#pragma once

#include <mma.h>

#include "numbers.h"

namespace xk::cuda {

// For bf16, nvcc uses generic addressing for wmma's loads; the inline PTX below specifies .shared.
template <class Fragment, class T>
__device__ void load_fragment(Fragment& x, const T* from, int ld) {
  nvcuda::wmma::load_matrix_sync(x, from, ld);
}

#ifndef XK_EMULATED
#define XK_LOAD_FRAGMENT(matrix, layout)                                                                            \
  __device__ inline void load_fragment(                                                                             \
      nvcuda::wmma::fragment<nvcuda::wmma::matrix_##matrix, 16, 16, 16, BFloat, nvcuda::wmma::layout##_major>& x,   \
      const BFloat* from, int ld) {                                                                                 \
    static_assert(sizeof(x) == 16);                                                                                 \
    uint32_t* to = reinterpret_cast<uint32_t*>(&x);                                                                 \
    asm volatile("wmma.load." #matrix ".sync.aligned." #layout ".m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;" \
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])                                               \
                 : "r"((uint32_t)__cvta_generic_to_shared(from)), "r"(ld)                                           \
                 : "memory");                                                                                       \
  }
XK_LOAD_FRAGMENT(a, row)
XK_LOAD_FRAGMENT(a, col)
XK_LOAD_FRAGMENT(b, row)
#undef XK_LOAD_FRAGMENT
#endif

// 16-bit tokens, by tensor cores: a warp accumulates kPerWarp tiles of 16 x 16.
template <class T, int M, int N, int kThreads, bool kTransposed>
class Product {
  static constexpr int kStep = 16, kTerms = 4;
  static constexpr int kAcross = N / 16, kTiles = M / 16 * kAcross, kWarps = kThreads / 32;
  static constexpr int kPerWarp = (kTiles + kWarps - 1) / kWarps;
  static constexpr int kGroups = kTiles < kWarps ? kWarps / kTiles : 1;
  // All tiles of a warp are in the same rows: the warp loads each fragment of a only once.
  static constexpr bool kOneRow = kAcross % kPerWarp == 0;
  static_assert(M % 16 == 0 && N % 16 == 0);

 public:
  __device__ Product() {
    for (int i = 0; i < kPerWarp; ++i) nvcuda::wmma::fill_fragment(sum_[i], 0.0f);
  }

  __device__ void multiply(Shared<T> a, int lda, Shared<T> b, int ldb, int depth, int rows = M) {
    if (group() >= kGroups) return;
    if constexpr (kTransposed) {
      // Adds partial sums of a few terms each: more accurate than one long sum over the tokens.
      for (int begin = kStep * group(); begin < depth; begin += kStep * kTerms * kGroups) {
        Sums now[kPerWarp];
        for (int i = 0; i < kPerWarp; ++i) nvcuda::wmma::fill_fragment(now[i], 0.0f);
        for (int term = 0, k = begin; term < kTerms && k < depth; ++term, k += kStep * kGroups)
          multiply_step(now, a, lda, b, ldb, k, rows);
        for (int i = 0; i < kPerWarp; ++i) add(sum_[i], now[i]);
      }
    } else {
      for (int k = kStep * group(); k < depth; k += kStep * kGroups) multiply_step(sum_, a, lda, b, ldb, k, rows);
    }
  }

  __device__ void store(Shared<float> out, int ld) {
    for (int g = 0; g < kGroups; ++g) {
      if (group() == g) {
#pragma unroll
        for (int i = 0; i < kPerWarp; ++i) {
          if (tile(i) >= kTiles) break;
          float* place = &out[tile(i) / kAcross * 16 * ld + tile(i) % kAcross * 16];
          if (g > 0) {
            Sums before;
            nvcuda::wmma::load_matrix_sync(before, place, ld, nvcuda::wmma::mem_row_major);
            add(sum_[i], before);
          }
          nvcuda::wmma::store_matrix_sync(place, sum_[i], ld, nvcuda::wmma::mem_row_major);
        }
      }
      if (g + 1 < kGroups) __syncthreads();  // the next group adds to these sums
    }
  }

 private:
  using Sums = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, kStep, float>;
  Sums sum_[kPerWarp];

  __device__ static int warp() { return (int)threadIdx.x / 32; }
  __device__ static int group() { return kTiles < kWarps ? warp() / kTiles : 0; }
  __device__ static int tile(int i) { return kTiles < kWarps ? warp() % kTiles : warp() * kPerWarp + i; }
  __device__ static void add(Sums& to, const Sums& x) {
    for (int e = 0; e < to.num_elements; ++e) to.x[e] += x.x[e];
  }
  // Accumulates the products over [k, k + kStep) of the depth.
  __device__ static void multiply_step(Sums (&to)[kPerWarp], Shared<T> a, int lda, Shared<T> b, int ldb, int k,
                                       int rows) {
    using namespace nvcuda;
    using Layout = std::conditional_t<kTransposed, wmma::col_major, wmma::row_major>;
    wmma::fragment<wmma::matrix_a, 16, 16, kStep, T, Layout> x;
#pragma unroll
    for (int i = 0; i < kPerWarp; ++i) {
      int row = tile(i) / kAcross * 16, column = tile(i) % kAcross * 16;
      if (tile(i) >= kTiles || (!kTransposed && row >= rows)) break;
      if (i == 0 || !kOneRow) {
        load_fragment(x, kTransposed ? &a[k * lda + row] : &a[row * lda + k], lda);
      }
      wmma::fragment<wmma::matrix_b, 16, 16, kStep, T, wmma::row_major> y;
      load_fragment(y, &b[k * ldb + column], ldb);
      wmma::mma_sync(to[i], x, y, to[i]);
    }
  }
};

// fp32: a thread accumulates 8 rows by 4 or 8 columns, by fused multiply-adds.
template <int M, int N, int kThreads, bool kTransposed>
class Product<float, M, N, kThreads, kTransposed> {
  static constexpr int kRows = 8, kColumns = M * N / 32 > kThreads ? 8 : 4;
  static constexpr int kAcross = N / kColumns, kDown = M / kRows, kOwners = kAcross * kDown;
  static constexpr int kGroups = kThreads / kOwners, kTerms = 32;
  static_assert(M % kRows == 0 && N % kColumns == 0 && kGroups >= 1);

 public:
  __device__ Product() {
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j) sum_[i][j] = 0;
  }

  __device__ void multiply(Shared<float> a, int lda, Shared<float> b, int ldb, int depth, int rows = M) {
    if (group() >= kGroups) return;
    if constexpr (kTransposed) {
      // Adds partial sums of a few terms each: more accurate than one long sum over the tokens.
      for (int begin = group(); begin < depth; begin += kTerms * kGroups) {
        float now[kRows][kColumns] = {};
        for (int term = 0, k = begin; term < kTerms && k < depth; ++term, k += kGroups) {
          alignas(16) float x[kRows], y[kColumns];
#pragma unroll
          for (int i = 0; i < kRows; i += 4) load_numbers<4>(x + i, &a[k * lda + row(i)]);
#pragma unroll
          for (int j = 0; j < kColumns; j += 4) load_numbers<4>(y + j, &b[k * ldb + column(j)]);
          add(now, x, y);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kColumns; ++j) sum_[i][j] += now[i][j];
      }
    } else {
      for (int k = 4 * group(); k < depth; k += 4 * kGroups) {
        alignas(16) float x[kRows][4];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          x[i][0] = x[i][1] = x[i][2] = x[i][3] = 0;
          if (row(i) < rows) load_numbers<4>(x[i], &a[row(i) * lda + k]);
        }
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) {
          alignas(16) float y[kColumns];
          float column_of_x[kRows];
#pragma unroll
          for (int j = 0; j < kColumns; j += 4) load_numbers<4>(y + j, &b[(k + kk) * ldb + column(j)]);
#pragma unroll
          for (int i = 0; i < kRows; ++i) column_of_x[i] = x[i][kk];
          add(sum_, column_of_x, y);
        }
      }
    }
  }

  __device__ void store(Shared<float> out, int ld) {
    for (int g = 0; g < kGroups; ++g) {
      if (group() == g) {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            float& place = out[row(i) * ld + column(j)];
            place = g == 0 ? sum_[i][j] : place + sum_[i][j];
          }
      }
      if (g + 1 < kGroups) __syncthreads();  // the next group adds to these sums
    }
  }

 private:
  float sum_[kRows][kColumns];

  __device__ static int group() { return (int)threadIdx.x / kOwners; }
  // Transposed: rows are contiguous in memory, and a thread takes runs of 4. Otherwise neighbouring threads take
  // neighbouring rows, which lie in different banks.
  __device__ static int row(int i) {
    int down = (int)threadIdx.x % kOwners / kAcross;
    return kTransposed ? 4 * down + i / 4 * (M / 2) + i % 4 : down + i * kDown;
  }
  __device__ static int column(int j) {
    return 4 * ((int)threadIdx.x % kAcross) + j / 4 * (N / (kColumns / 4)) + j % 4;
  }
  __device__ static void add(float (&to)[kRows][kColumns], const float* x, const float* y) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) to[i][j] += x[i] * y[j];
  }
};

}  // namespace xk::cuda
