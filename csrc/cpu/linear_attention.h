// Forward and backward of linear attention. The forward is a pass over keys and values, then one over queries; the
// backward has them in the reverse order. Between the passes, the matrices of each head are processed.
#pragma once

#include "plan.h"

namespace xk {
namespace XK_LEVEL {
namespace {

template <class T>
struct LinearAttention {
  const xk_linear_attention_args& p;
  int dim, dim_v, ld, ld_v, widest;
  bool softmax_tokens;
  // sums: S (dim x ld_v), then z, padded. Operands of a head: S^T or dS^T (dim_v x ld), dS (dim x ld_v), z or the term
  // added to the gradient of phi(k), and the maxima of the features of k.
  size_t sums_size, operands_size, scratch;
  Plan keys, queries;

  explicit LinearAttention(const xk_linear_attention_args& p)
      : p(p),
        dim(int(p.dim)),
        dim_v(int(p.dim_v)),
        ld(padded<T>(dim)),
        ld_v(padded<T>(dim_v)),
        widest(dim > dim_v ? dim : dim_v),
        softmax_tokens(p.features_k == XK_SOFTMAX_TOKENS),
        sums_size((size_t)dim * ld_v + ld),
        operands_size((size_t)dim_v * ld + (size_t)dim * ld_v + 2 * ld),
        scratch(pass_scratch<T>(widest)),
        keys(plan_of(p.tokens, channel_major(p.k) && channel_major(p.v))),
        queries(plan_of(p.queries, channel_major(p.q))) {}

  Plan plan_of(int64_t tokens, bool by_rows) const {
    const int multiple = by_rows ? VL<T> : 0;
    return Plan(p.batch, p.heads, tokens, widest, block_tokens<T>(widest, by_rows), sizeof(T), multiple);
  }

  struct Operands {
    T *transposed, *matrix, *vector, *highest;
  };
  Operands operands_of(T* all, int64_t bh) const {
    T* transposed = all + bh * operands_size;
    T* matrix = transposed + (size_t)dim_v * ld;
    return {transposed, matrix, matrix + (size_t)dim * ld_v, matrix + (size_t)dim * ld_v + ld};
  }
  // S, z and the maxima of a head, as saved by the forward.
  T* stats_of(int64_t bh) const { return (T*)p.stats + bh * ((size_t)dim * dim_v + (softmax_tokens ? 2 : 1) * dim); }

  Pass<T> of_queries(int64_t b, int64_t h) const {
    Pass<T> pass;
    set_mask(pass, p.query_mask, b);
    pass.in[0] = operand(p.q, b, h, dim);
    pass.in[0].features = p.features_q;
    pass.operands = 1;
    pass.quotient.of = p.normalize ? 0 : -1;
    pass.quotient.eps = T(p.eps);
    pass.quotient.scale = T(p.scale);
    return pass;
  }
  Pass<T> of_keys(int64_t b, int64_t h, const T* highest) const {
    Pass<T> pass;
    set_mask(pass, p.token_mask, b);
    pass.in[0] = operand(p.k, b, h, dim);
    pass.in[0].features = p.features_k;
    if (softmax_tokens) pass.center[0] = highest;
    pass.in[1] = operand(p.v, b, h, dim_v);
    pass.operands = 2;
    return pass;
  }

  // Runs pass_of(unit, head) on all blocks of tokens of every unit.
  template <class F>
  void walk(const Plan& plan, T* own, F pass_of) const {
    parallel_for(plan.units(), p.threads, [&](int64_t index, int thread) {
      Unit u(plan, index);
      sweep<T>(plan, u, widest, own + thread * scratch, [&](int64_t h) { return pass_of(u, h); });
    });
  }
  // Sums over the tokens of each chunk: pass_of(unit, head, to) returns a pass that adds to `to`, zeroed first.
  template <class F>
  void gather(const Plan& plan, T* own, T* sums, F pass_of) const {
    walk(plan, own, [&](const Unit& u, int64_t h) {
      T* to = sums + ((u.b * p.heads + h) * plan.chunks + u.s) * sums_size;
      zero(to, sums_size);
      return pass_of(u, h, to);
    });
  }

  // The maxima of the features of k over the unmasked tokens; -inf if there are none. block: scratch of the thread.
  void find_highest(int64_t bh, T* highest, T* block) const {
    const int64_t b = bh / p.heads, h = bh % p.heads;
    for (int c = 0; c < ld; ++c) highest[c] = c < dim ? -T(__builtin_inf()) : T(0);
    Pass<T> pass;
    set_mask(pass, p.token_mask, b);
    pass.in[0] = operand(p.k, b, h, dim);
    const uint8_t* mask = pass.mask;
    pass.mask = nullptr;  // masked tokens are skipped below, not zeroed
    for (int64_t first = 0; first < p.tokens; first += keys.block) {
      const int tokens = int(least(keys.block, p.tokens - first));
      pack(pass, 0, first, tokens, block, (T*)nullptr);
      for (int n = 0; n < tokens; ++n) {
        if (mask && !mask[(first + n) * pass.mask_stride]) continue;
        for (int c = 0; c < ld; c += VL<T>) {
          const V<T> x = load(block + (ptrdiff_t)n * ld + c), most = load(highest + c);
          store(highest + c, x > most ? x : x == x ? most : x);  // NaN stays
        }
      }
    }
  }

  int forward() const {
    const int64_t heads = p.batch * p.heads;
    Buffer<T> sums(heads * keys.chunks * sums_size), highest(softmax_tokens ? heads * ld : 0), own(p.threads * scratch);
    if (!sums.data || !highest.data || !own.data) return XK_OUT_OF_MEMORY;
    if (softmax_tokens)
      parallel_for(heads, p.threads, [&](int64_t bh, int thread) {
        find_highest(bh, highest.data + bh * ld, own.data + thread * scratch);
      });
    gather(keys, own.data, sums.data, [&](const Unit& u, int64_t h, T* to) {
      Pass<T> pass = of_keys(u.b, h, highest.data + (u.b * p.heads + h) * ld);
      pass.gram = {0, 1, to};
      pass.sums[0] = to + (size_t)dim * ld_v;
      return pass;
    });
    parallel_for(heads, p.threads, [&](int64_t bh, int) {
      T *S = sums.data + bh * keys.chunks * sums_size, *z = S + (size_t)dim * ld_v;
      sum_chunks(S, keys.chunks, sums_size);
      T* saved = stats_of(bh);
      memcpy(saved + (size_t)dim * dim_v, z, dim * sizeof(T));
      if (softmax_tokens) memcpy(saved + (size_t)dim * dim_v + dim, highest.data + bh * ld, dim * sizeof(T));
      for (int i = 0; i < dim; ++i) {
        T* row = S + (ptrdiff_t)i * ld_v;
        if (softmax_tokens && z[i] != 0) {
          for (int j = 0; j < dim_v; ++j) row[j] /= z[i];
          z[i] /= z[i];  // NaN stays
        }
        memcpy(saved + (ptrdiff_t)i * dim_v, row, dim_v * sizeof(T));
      }
    });
    walk(queries, own.data, [&](const Unit& u, int64_t h) {
      const T* S = sums.data + (u.b * p.heads + h) * keys.chunks * sums_size;
      Pass<T> pass = of_queries(u.b, h);
      if (p.normalize) pass.quotient.z = S + (size_t)dim * ld_v;
      pass.mixes = 1;
      pass.mix[0].x = pass.mix[0].ahead = 0;
      pass.mix[0].w = S;
      pass.mix[0].y = operand(p.out, u.b, h, dim_v);
      return pass;
    });
    return XK_OK;
  }

  int backward() const {
    const int64_t heads = p.batch * p.heads;
    Buffer<T> sums(heads * queries.chunks * sums_size), operands(heads * operands_size), own(p.threads * scratch);
    if (!sums.data || !operands.data || !own.data) return XK_OUT_OF_MEMORY;
    parallel_for(heads, p.threads, [&](int64_t bh, int) {
      const Operands to = operands_of(operands.data, bh);
      const T *S = stats_of(bh), *z = S + (size_t)dim * dim_v;
      zero(to.transposed, operands_size);
      for (int i = 0; i < dim; ++i) {
        for (int j = 0; j < dim_v; ++j) to.transposed[(ptrdiff_t)j * ld + i] = S[(ptrdiff_t)i * dim_v + j];
        to.vector[i] = softmax_tokens && z[i] != 0 ? z[i] / z[i] : z[i];
        if (softmax_tokens) to.highest[i] = z[dim + i];
      }
    });
    // dq = g S^T minus the term of the denominators; dS = phi(q)^T g
    gather(queries, own.data, sums.data, [&](const Unit& u, int64_t h, T* to) {
      const Operands from = operands_of(operands.data, u.b * p.heads + h);
      Pass<T> pass = of_queries(u.b, h);
      pass.in[1] = operand(p.dout, u.b, h, dim_v);
      pass.operands = 2;
      pass.quotient.scaled = 1;
      if (p.normalize) {
        pass.quotient.z = from.vector;
        pass.quotient.dz = to + (size_t)dim * ld_v;
      }
      pass.gram = {0, 1, to};
      pass.mixes = 1;
      Mix<T>& dq = pass.mix[0];
      dq.x = 1;
      dq.w = from.transposed;
      dq.unit = p.normalize || p.features_q ? 0 : -1;
      dq.y = operand(p.dq, u.b, h, dim);
      return pass;
    });
    parallel_for(heads, p.threads, [&](int64_t bh, int) {
      T *dS = sums.data + bh * queries.chunks * sums_size, *dz = dS + (size_t)dim * ld_v;
      sum_chunks(dS, queries.chunks, sums_size);
      const Operands to = operands_of(operands.data, bh);
      const T *S = stats_of(bh), *z = S + (size_t)dim * dim_v;
      for (int i = 0; i < dim; ++i) {
        const T* row = dS + (ptrdiff_t)i * ld_v;
        // The keys of a softmax over tokens are exp(k - highest) / z; its backward subtracts a mean over the tokens,
        // which is computed here
        const T by = softmax_tokens ? (z[i] != 0 ? 1 / z[i] : T(0)) : T(1);
        double mean = 0;
        if (softmax_tokens)
          for (int j = 0; j < dim_v; ++j) mean += double(row[j]) * double(S[(ptrdiff_t)i * dim_v + j]);
        to.vector[i] = softmax_tokens ? -T(mean) * by : dz[i];
        for (int j = 0; j < dim_v; ++j) {
          to.transposed[(ptrdiff_t)j * ld + i] = row[j] * by;
          to.matrix[(ptrdiff_t)i * ld_v + j] = row[j] * by;
        }
      }
    });
    walk(keys, own.data, [&](const Unit& u, int64_t h) {
      const Operands from = operands_of(operands.data, u.b * p.heads + h);
      Pass<T> pass = of_keys(u.b, h, from.highest);
      pass.mixes = 2;
      Mix<T>&dk = pass.mix[0], &dv = pass.mix[1];
      dk.x = 1, dk.w = from.transposed, dk.bias = from.vector;
      dk.unit = p.features_k ? 0 : -1;
      dk.ahead = 0;
      dk.y = operand(p.dk, u.b, h, dim);
      dv.x = 0, dv.w = from.matrix;
      dv.ahead = 1;
      dv.y = operand(p.dv, u.b, h, dim_v);
      return pass;
    });
    return XK_OK;
  }
};

}  // namespace
}  // namespace XK_LEVEL
}  // namespace xk
