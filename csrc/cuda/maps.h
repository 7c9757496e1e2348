// The D x D algebra between the passes. All threads of a block compute some columns of a map at a time.
//
//   query_key   X[j,i] = cos(k_j, q_i), rows are key features:  A^T[j,i] = softmax_j(t X) or t X;   out = v A^T
//   key_value   X[i,j] = sum_n k[n,i] v[n,j] / |k_i|:           W[i,j] = t X / |q_i|;               out = q W
//
// Backward computes the maps P and Q from the Gram matrix dW[j,i] (of v and dout) or dW[i,j] (of q and dout). It also
// computes sq and sk, the scales of the terms that the norms of q and k add to dq and dk:
//
//   query_key   P = dG, Q = A^T    dq = k P + q sq     dk = q P^T + k sk    dv = dout Q^T
//   key_value   P = U,  Q = W      dq = dout Q^T + q sq    dk = v P^T + k sk    dv = k P
//
// Softmax and the sums of sq (query_key) run down columns; the sums of sk run along rows, as do those of sq
// (key_value). A block that owns some columns has complete sums down columns, but only partial sums along rows.
#pragma once

#include "numbers.h"

namespace xk::cuda {

struct MapOptions {
  int32_t key_value, token_norm, softmax;
  double eps;
};

// A record of dim * dim + 2 * dim numbers per (batch, head): X, then |q| and |k| over the tokens, before the clamp by
// eps.
struct Stats {
  float* record;
  int dim;

  __device__ float& x(int row, int column) const { return record[row * dim + column]; }
  __device__ float* norms_q() const { return record + dim * dim; }
  __device__ float* norms_k() const { return norms_q() + dim; }
};

// Scale of the term that a norm adds to a gradient: -total / |x|^2, or 0 if the norm is clamped to eps.
__device__ inline float norm_term(const MapOptions& o, float total, float norm) {
  return !o.token_norm || norm <= (float)o.eps ? 0.f : -total / norm / norm;
}

// Clamped norms of the features of k and q; 1 without token norm.
struct Divisors {
  Shared<float> k, q;

  // Sets k and q from the norms over tokens. The caller must synchronise before reading them.
  template <int kThreads, class NormK, class NormQ>
  __device__ void set(const MapOptions& o, int dim, NormK norm_k, NormQ norm_q) const {
#pragma unroll 1
    for (int c = (int)threadIdx.x; c < dim; c += kThreads) {
      float of_k = norm_k(c), of_q = norm_q(c);
      k[c] = o.token_norm ? clamp_norm(of_k, (float)o.eps) : 1.f;
      q[c] = o.token_norm ? clamp_norm(of_q, (float)o.eps) : 1.f;
    }
  }
};

// Distribution of the columns [first, first + count) of a map over the threads of a block. Columns are processed in
// strips of `width` columns (a power of two, at most 32). In a strip, a thread has one column, and rows that are
// kThreads / width apart.
template <int kThreads>
class Columns {
 public:
  static constexpr int kScratch = kThreads;

  __device__ Columns(int dim, int first, int count, Shared<float> scratch)
      : first_(first), end_(first + count < dim ? first + count : dim), scratch_(scratch) {
    width_ = 1;
    while (width_ < 32 && width_ < count) width_ *= 2;
  }
  __device__ int width() const { return width_; }
  __device__ int lane() const { return (int)threadIdx.x % width_; }
  __device__ int row() const { return (int)threadIdx.x / width_; }
  __device__ int rows_between() const { return kThreads / width_; }
  // Number of strips. Threads without a column in the last strip must still take part in the reductions.
  __device__ int strips() const { return end_ > first_ ? (end_ - first_ + width_ - 1) / width_ : 0; }
  __device__ int column(int strip) const { return first_ + strip * width_ + lane(); }
  __device__ bool has(int strip) const { return column(strip) < end_; }

  // Reduction over all rows of each column; all threads of the column get the result.
  template <class Combine>
  __device__ float down(float x, Combine combine) const {
    for (int step = 16; step >= width_; step /= 2) {
      float other = __shfl_xor_sync(0xffffffffu, x, step);
      XK_STEP(shuffle, x = combine(x, other));
    }
    int warp = (int)threadIdx.x / 32;
    if ((int)threadIdx.x % 32 < width_) scratch_[warp * 32 + lane()] = x;
    __syncthreads();  // all warps have stored their partial results
    float total = scratch_[lane()];
#pragma unroll 1
    for (int w = 1; w < kThreads / 32; ++w) total = combine(total, scratch_[w * 32 + lane()]);
    __syncthreads();  // scratch can be reused
    return total;
  }
  __device__ float sum_down(float x) const {
    return down(x, [](float a, float b) { return a + b; });
  }

  // Sum over the columns of a strip within a row; valid in the threads of the strip's first column.
  __device__ float sum_across(float x) const {
    for (int step = width_ / 2; step > 0; step /= 2) {
      float other = __shfl_xor_sync(0xffffffffu, x, step);
      XK_STEP(shuffle, x += other);
    }
    return x;
  }

 private:
  int first_, end_, width_;
  Shared<float> scratch_;
};

// Computes columns of the map that tokens are multiplied by, from the Gram matrix `gram(row, column)`, and calls
// result(row, column, value) for each element. `strip`: dim x width numbers; each thread accesses only its own
// elements.
template <int kThreads, class Gram, class Result>
__device__ void forward_columns(const Columns<kThreads>& own, const MapOptions& o, int dim, float temperature,
                                Divisors by, const Stats& stats, Shared<float> strip, Gram gram, Result result) {
#pragma unroll 1
  for (int s = 0; s < own.strips(); ++s) {
    int i = own.column(s);
    bool has = own.has(s);
    float highest = -INFINITY;
    if (has)
      for (int j = own.row(); j < dim; j += own.rows_between()) {
        float x = gram(j, i) / by.k[j];
        if (!o.key_value) x /= by.q[i];
        stats.x(j, i) = x;
        x *= temperature;
        if (o.key_value) x /= by.q[j];
        if (!o.softmax) result(j, i, x);
        strip[j * own.width() + own.lane()] = x;
        highest = x > highest ? x : highest;
      }
    if (!o.softmax) continue;
    highest = own.down(highest, [](float a, float b) { return a > b ? a : b; });
    float total = 0;
    if (has)
      for (int j = own.row(); j < dim; j += own.rows_between()) {
        float e = exp(strip[j * own.width() + own.lane()] - highest);
        strip[j * own.width() + own.lane()] = e;
        total += e;
      }
    total = own.sum_down(total);
    if (has)
      for (int j = own.row(); j < dim; j += own.rows_between())
        result(j, i, strip[j * own.width() + own.lane()] / total);
  }
}

// Computes columns of P and Q from dW, `gradient(row, column)`, and calls result(row, column, p, q) for each element.
// Calls of_column(i, sum) with the sum for the norm of column i (query_key only). Adds this block's partial sum for row
// j to totals[j], which must be initialised to 0. Returns this thread's partial sum of dtemperature.
template <int kThreads, class Gradient, class Result, class OfColumn>
__device__ float backward_columns(const Columns<kThreads>& own, const MapOptions& o, int dim, float temperature,
                                  Divisors by, const Stats& stats, Shared<float> strip, Shared<float> totals,
                                  Gradient gradient, Result result, OfColumn of_column) {
  float dtemperature = 0;
#pragma unroll 1
  for (int s = 0; s < own.strips(); ++s) {
    int i = own.column(s);
    bool has = own.has(s);
    float highest = -INFINITY, total = 0, mean = 0, of_norm = 0;
    if (has)
      for (int j = own.row(); j < dim; j += own.rows_between()) {
        strip[j * own.width() + own.lane()] = gradient(j, i);
        float x = temperature * stats.x(j, i);
        highest = x > highest ? x : highest;
      }
    if (o.softmax) {
      highest = own.down(highest, [](float a, float b) { return a > b ? a : b; });
      if (has)
        for (int j = own.row(); j < dim; j += own.rows_between()) {
          float e = exp(temperature * stats.x(j, i) - highest);
          total += e;
          mean += e * strip[j * own.width() + own.lane()];
        }
      total = own.sum_down(total);
      mean = own.sum_down(mean) / total;
    }
    // all threads of a warp take part in sum_across: threads without a row or a column contribute 0
#pragma unroll 1
    for (int begin = 0; begin < dim; begin += own.rows_between()) {
      int j = begin + own.row();
      float along = 0;
      if (has && j < dim) {
        float x = stats.x(j, i), dw = strip[j * own.width() + own.lane()], p, q;
        if (o.key_value) {
          q = temperature * x / by.q[j];
          p = temperature * dw / by.k[j] / by.q[j];
          dtemperature += dw * x / by.q[j];
          along = dw * q;
        } else {
          q = temperature * x;
          if (o.softmax) {
            q = exp(q - highest) / total;
            dw = q * (dw - mean);
          }
          dtemperature += dw * x;
          p = temperature * dw;
          along = p * x;
          p = p / by.k[j] / by.q[i];
        }
        result(j, i, p, q);
        of_norm += along;
      }
      along = own.sum_across(along);
      if (own.lane() == 0 && j < dim) totals[j] += along;
    }
    if (o.token_norm && !o.key_value) {
      of_norm = own.sum_down(of_norm);
      if (has && own.row() == 0) of_column(i, of_norm);
    }
  }
  return dtemperature;
}

// Sum over all threads of a block, returned to every thread.
template <int kThreads>
__device__ float block_sum(float x, Shared<float> scratch) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();  // all warps have stored their sums
  float total = scratch[0];
  for (int w = 1; w < kThreads / 32; ++w) total += scratch[w];
  __syncthreads();  // scratch can be reused
  return total;
}

}  // namespace xk::cuda
