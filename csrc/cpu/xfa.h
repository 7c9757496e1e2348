// Forward and backward of xfa: two passes each, with the D x D algebra of maps.h between them.
#pragma once

#include "maps.h"
#include "plan.h"

namespace xk {
namespace XK_LEVEL {
namespace {

template <class T>
Head<T> head_of(const xk_xfa_args& p, int64_t b, int64_t h) {
  int dim = int(p.dim);
  bool key_value = p.map == XK_KEY_VALUE;
  return {dim,
          padded<T>(dim),
          key_value,
          p.norm == XK_TOKEN_NORM,
          !key_value && p.activation == XK_SOFTMAX,
          T(p.eps),
          T(load_scalar(p.temperature.data, h * p.temperature.stride, p.temperature.dtype)),
          (T*)p.stats + (b * p.heads + h) * ((size_t)dim * dim + 2 * dim)};
}

template <class T>
struct Xfa {
  const xk_xfa_args& p;
  int dim, ld;
  bool by_rows;  // q, k and v are channel-major, and so are the results
  bool key_value, token_norm, feature_norm, pairs;
  size_t matrix, sums_size, scratch;
  Plan plan;

  explicit Xfa(const xk_xfa_args& p)
      : p(p),
        dim(int(p.dim)),
        ld(padded<T>(dim)),
        by_rows(channel_major(p.q) && channel_major(p.k) && channel_major(p.v)),
        key_value(p.map == XK_KEY_VALUE),
        token_norm(p.norm == XK_TOKEN_NORM),
        feature_norm(p.norm == XK_FEATURE_NORM),
        pairs(kPairs && p.q.dtype == XK_BF16 && !feature_norm && dim % 2 == 0 && !p.mask.data && pairable(p.q) &&
              pairable(p.k) && pairable(p.v) && pairable(p.dout)),
        matrix((size_t)dim * ld),
        sums_size(matrix + 2 * ld),
        scratch(pass_scratch<T>(dim)),
        plan(p.batch, p.heads, p.tokens, dim, block_tokens<T>(dim, by_rows), sizeof(T), by_rows ? VL<T> : 0) {}

  static bool pairable(const xk_tensor& t) { return !t.data || (t.stride_d == 1 && t.stride_n % 2 == 0); }
  // Converts W to the layout that the mixes read.
  void ready(T* w) const {
    if constexpr (kPairs && sizeof(T) == sizeof(float))
      if (pairs) pair_rows(w, dim, ld);
  }

  Pass<T> empty_pass(int64_t b) const {
    Pass<T> pass;
    set_mask(pass, p.mask, b);
    pass.eps = T(p.eps);
    pass.pairs = pairs;
    return pass;
  }
  Operand in(const xk_tensor& t, int64_t b, int64_t h, bool normalised) const {
    return operand(t, b, h, dim, normalised && feature_norm);
  }

  // Gram matrix of k with q (query_key) or with v (key_value), and the sums of squares of q and k.
  Pass<T> forward_sums(int64_t b, int64_t h, T* sums) const {
    Pass<T> pass = empty_pass(b);
    pass.in[0] = in(p.k, b, h, true);
    pass.in[1] = key_value ? in(p.v, b, h, false) : in(p.q, b, h, true);
    pass.operands = 2;
    pass.gram = {0, 1, sums};
    if (token_norm) {
      pass.ssq[0] = sums + matrix + ld;
      if (key_value) pass.in[pass.operands++] = in(p.q, b, h, true);
      pass.ssq[pass.operands - 1] = sums + matrix;
    }
    return pass;
  }
  Pass<T> forward_mix(int64_t b, int64_t h, const T* w) const {
    Pass<T> pass = empty_pass(b);
    pass.in[0] = key_value ? in(p.q, b, h, true) : in(p.v, b, h, false);
    pass.operands = 1;
    pass.mixes = 1;
    pass.mix[0].x = pass.mix[0].ahead = 0;
    pass.mix[0].w = w;
    pass.mix[0].y = in(p.out, b, h, false);
    return pass;
  }

  // query_key: dA^T[j,i] = sum_n v[n,j] dout[n,i], and dv = dout A in the same pass. key_value: dW = gram(q, dout).
  Pass<T> backward_sums(int64_t b, int64_t h, T* sums, const T* a) const {
    Pass<T> pass = empty_pass(b);
    pass.in[0] = key_value ? in(p.q, b, h, true) : in(p.v, b, h, false);
    pass.in[1] = in(p.dout, b, h, false);
    pass.operands = 2;
    pass.gram = {0, 1, sums};
    if (!key_value) {
      pass.mixes = 1;
      pass.mix[0].x = 1;
      pass.mix[0].w = a;
      pass.mix[0].y = in(p.dv, b, h, false);
    }
    return pass;
  }
  // The gradients of q and k (and of v for key_value). m0, m1, m2: dG^T, dG for query_key; dG, dG^T, W^T for key_value.
  Pass<T> backward_mix(int64_t b, int64_t h, const T* m0, const T* m1, const T* m2, const T* scale_q,
                       const T* scale_k) const {
    Pass<T> pass = empty_pass(b);
    pass.in[0] = in(p.q, b, h, true);
    pass.in[1] = in(p.k, b, h, true);
    pass.operands = 2;
    pass.mixes = 2;
    Mix<T>&dq = pass.mix[0], &dk = pass.mix[1];
    dq.ahead = 0, dk.ahead = 1;
    if (key_value) {
      pass.in[2] = in(p.v, b, h, false);
      pass.in[3] = in(p.dout, b, h, false);
      pass.operands = 4;
      dq.x = 3, dq.w = m2;
      dk.x = 2, dk.w = m1;
      Mix<T>& dv = pass.mix[pass.mixes++];
      dv.x = 1, dv.w = m0;
      dv.y = in(p.dv, b, h, false);
    } else {
      dq.x = 1, dq.w = m0;
      dk.x = 0, dk.w = m1;
    }
    if (token_norm) {
      dq.add = 0, dq.scale = scale_q;
      dk.add = 1, dk.scale = scale_k;
    } else if (feature_norm) {
      dq.unit = 0;
      dk.unit = 1;
    }
    dq.y = in(p.dq, b, h, false);
    dk.y = in(p.dk, b, h, false);
    return pass;
  }

  int forward() const {
    // With one chunk, a unit computes everything from the Gram matrix to the output, with its matrices in the cache of
    // its thread. With several chunks, there are three steps over all units.
    bool alone = plan.chunks == 1;
    size_t slots = alone ? p.threads * plan.group : p.batch * p.heads * plan.chunks;
    Buffer<T> sums(slots * sums_size), own(p.threads * (scratch + ld));
    if (!sums.data || !own.data) return XK_OUT_OF_MEMORY;
    auto sums_of = [&](const Unit& u, int64_t h, int thread, int64_t s) {
      return sums.data + (alone ? thread * plan.group + h - u.h0 : (u.b * p.heads + h) * plan.chunks + s) * sums_size;
    };
    auto gather = [&](const Unit& u, int thread) {
      for (int64_t h = u.h0; h < u.h1; ++h) zero(sums_of(u, h, thread, u.s), sums_size);
      sweep<T>(plan, u, dim, own.data + thread * (scratch + ld),
               [&](int64_t h) { return forward_sums(u.b, h, sums_of(u, h, thread, u.s)); });
    };
    auto finish = [&](int64_t b, int64_t h, T* g, int thread) {
      sum_chunks(g, plan.chunks, sums_size);
      forward_map(head_of<T>(p, b, h), g, g + matrix, g + matrix + ld, own.data + thread * (scratch + ld) + scratch);
      ready(g);
    };
    auto mix = [&](const Unit& u, int thread) {
      sweep<T>(plan, u, dim, own.data + thread * (scratch + ld),
               [&](int64_t h) { return forward_mix(u.b, h, sums_of(u, h, thread, 0)); });
    };
    if (alone) {
      parallel_for(plan.units(), p.threads, [&](int64_t index, int thread) {
        Unit u(plan, index);
        gather(u, thread);
        for (int64_t h = u.h0; h < u.h1; ++h) finish(u.b, h, sums_of(u, h, thread, 0), thread);
        mix(u, thread);
      });
    } else {
      parallel_for(plan.units(), p.threads, [&](int64_t index, int thread) { gather(Unit(plan, index), thread); });
      parallel_for(p.batch * p.heads, p.threads, [&](int64_t bh, int thread) {
        finish(bh / p.heads, bh % p.heads, sums.data + bh * plan.chunks * sums_size, thread);
      });
      parallel_for(plan.units(), p.threads, [&](int64_t index, int thread) { mix(Unit(plan, index), thread); });
    }
    return XK_OK;
  }

  // Operands of a head: A^T, overwritten by dG; A (key_value: W, overwritten by dG^T; W^T); and the two scales. The sum
  // dA^T becomes dG^T in place (key_value: dW becomes dG).
  int backward() const {
    bool alone = plan.chunks == 1;
    size_t operands_size = 2 * matrix + 2 * ld;
    size_t slots = alone ? p.threads * plan.group : p.batch * p.heads;
    Buffer<T> sums((alone ? slots : slots * plan.chunks) * matrix), operands(slots * operands_size);
    Buffer<T> own(p.threads * (scratch + ld));
    Buffer<double> dt(p.batch * p.heads);
    if (!sums.data || !operands.data || !own.data || !dt.data) return XK_OUT_OF_MEMORY;
    auto slot = [&](int64_t b, int64_t h, int64_t h0, int thread) {
      return alone ? thread * plan.group + h - h0 : b * p.heads + h;
    };
    auto sums_of = [&](const Unit& u, int64_t h, int thread, int64_t s) {
      return sums.data + (slot(u.b, h, u.h0, thread) * plan.chunks + s) * matrix;
    };
    auto operands_of = [&](const Unit& u, int64_t h, int thread) {
      return operands.data + slot(u.b, h, u.h0, thread) * operands_size;
    };
    auto prepare = [&](int64_t b, int64_t h, T* m, int thread) {
      Head<T> head = head_of<T>(p, b, h);
      saved_map(head, m, own.data + thread * (scratch + ld) + scratch);
      if (!key_value) {
        transpose(m, m + matrix, dim, ld);
        ready(m + matrix);
      }
    };
    auto gather = [&](const Unit& u, int thread) {
      for (int64_t h = u.h0; h < u.h1; ++h) zero(sums_of(u, h, thread, u.s), matrix);
      sweep<T>(plan, u, dim, own.data + thread * (scratch + ld), [&](int64_t h) {
        return backward_sums(u.b, h, sums_of(u, h, thread, u.s), operands_of(u, h, thread) + matrix);
      });
    };
    auto finish = [&](int64_t b, int64_t h, T* d, T* m) {
      sum_chunks(d, plan.chunks, matrix);
      Head<T> head = head_of<T>(p, b, h);
      T *scale_q = m + 2 * matrix, *scale_k = scale_q + ld;
      dt.data[b * p.heads + h] = key_value ? backward_key_value(head, d, m, m + matrix, scale_q, scale_k)
                                           : backward_query_key(head, d, m, scale_q, scale_k);
      ready(d);
      ready(m);
      if (key_value) ready(m + matrix);
    };
    auto mix = [&](const Unit& u, int thread) {
      sweep<T>(plan, u, dim, own.data + thread * (scratch + ld), [&](int64_t h) {
        T* m = operands_of(u, h, thread);
        return backward_mix(u.b, h, sums_of(u, h, thread, 0), m, m + matrix, m + 2 * matrix, m + 2 * matrix + ld);
      });
    };
    if (alone) {
      parallel_for(plan.units(), p.threads, [&](int64_t index, int thread) {
        Unit u(plan, index);
        for (int64_t h = u.h0; h < u.h1; ++h) prepare(u.b, h, operands_of(u, h, thread), thread);
        gather(u, thread);
        for (int64_t h = u.h0; h < u.h1; ++h) finish(u.b, h, sums_of(u, h, thread, 0), operands_of(u, h, thread));
        mix(u, thread);
      });
    } else {
      parallel_for(p.batch * p.heads, p.threads, [&](int64_t bh, int thread) {
        prepare(bh / p.heads, bh % p.heads, operands.data + bh * operands_size, thread);
      });
      parallel_for(plan.units(), p.threads, [&](int64_t index, int thread) { gather(Unit(plan, index), thread); });
      parallel_for(p.batch * p.heads, p.threads, [&](int64_t bh, int) {
        finish(bh / p.heads, bh % p.heads, sums.data + bh * plan.chunks * matrix, operands.data + bh * operands_size);
      });
      parallel_for(plan.units(), p.threads, [&](int64_t index, int thread) { mix(Unit(plan, index), thread); });
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      double total = 0;
      for (int64_t b = 0; b < p.batch; ++b) total += dt.data[b * p.heads + h];
      store_scalar(p.dtemperature.data, h * p.dtemperature.stride, p.dtemperature.dtype, total);
    }
    return XK_OK;
  }
};

}  // namespace
}  // namespace XK_LEVEL
}  // namespace xk
