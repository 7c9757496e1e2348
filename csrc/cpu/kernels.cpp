// The four entry points at one instruction level. This file is compiled once per level (XK_LEVEL names it) and must
// not instantiate anything outside its own namespace: a weak symbol built for a newer level would be linked for all.
#include <stdlib.h>

#include "../include/xformer_kernels.h"
#include "maps.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace xk {
namespace XK_LEVEL {
namespace {

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
struct Buffer {
  T* data;
  explicit Buffer(size_t count) : data((T*)aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)) {}
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// f(unit, thread) for each unit. Results may depend on the unit alone, so that any number of threads gives the same
// bits.
template <class F>
void parallel_for(int64_t units, [[maybe_unused]] int threads, F f) {
#if defined(_OPENMP)
  if (threads > 1 && units > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t u = 0; u < units; ++u) f(u, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t u = 0; u < units; ++u) f(u, 0);
}

// How a (batch, heads, tokens) problem is cut, from its shape alone. A unit is (batch, group of heads, chunk of
// tokens): the heads of a token lie side by side in memory, so a unit walks blocks of tokens and, inside, its heads.
struct Plan {
  int64_t batch, heads, tokens, chunks, chunk, group, groups;
  int block;  // tokens packed at a time, at most widest_block

  Plan(int64_t batch, int64_t heads, int64_t tokens, int dim, int widest_block, int itemsize)
      : batch(batch), heads(heads), tokens(tokens) {
    const int64_t target = 64, shortest = 1024;
    int64_t matrix = (int64_t)dim * dim * itemsize;
    chunks = least(divide_up(target, most(batch, 1)), tokens / shortest);
    chunks = most(least(chunks, (512 << 10) / matrix), 1);
    int64_t blocks = divide_up(most(divide_up(tokens, chunks), 1), widest_block);
    block = int(divide_up(divide_up(most(tokens, 1), chunks), blocks));
    chunk = blocks * block;
    int64_t fits = most((256 << 10) / matrix, 1), wanted = divide_up(8, most(batch * chunks, 1));
    groups = least(most(divide_up(heads, fits), wanted), heads);
    group = groups ? divide_up(heads, groups) : 1;
    groups = divide_up(heads, group);
  }
  int64_t units() const { return batch * groups * chunks; }
};

struct Unit {
  int64_t b, h0, h1, s, n0, n1;
  Unit(const Plan& p, int64_t u)
      : b(u / (p.groups * p.chunks)),
        h0(u / p.chunks % p.groups * p.group),
        h1(least(h0 + p.group, p.heads)),
        s(u % p.chunks),
        n0(s * p.chunk),
        n1(least(n0 + p.chunk, p.tokens)) {}
};

// Walks a unit's tokens; make(h) describes the pass of a head.
template <class T, class F>
void sweep(const Plan& plan, const Unit& u, int widest, T* scratch, F make) {
  if (u.n0 >= u.n1) return;
  Pass<T> pass = make(u.h0);
  for (int64_t n = u.n0, h = u.h0;;) {
    int64_t next_h = h + 1 < u.h1 ? h + 1 : u.h0, next_n = next_h > h ? n : n + plan.block;
    bool more = next_n < u.n1;
    Pass<T> next = make(next_h);
    run_block<T>(pass, n, int(least(plan.block, u.n1 - n)), more ? &next : nullptr, next_n, widest, scratch);
    if (!more) return;
    pass = next;
    n = next_n, h = next_h;
  }
}

template <class T>
void zero(T* p, size_t count) {
  memset(p, 0, count * sizeof(T));
}

template <class T>
void sum_chunks(T* first, int64_t chunks, size_t count) {
  for (int64_t s = 1; s < chunks; ++s)
    for (size_t i = 0; i < count; i += VL<T>) store(first + i, load(first + i) + load(first + s * count + i));
}

double load_scalar(const void* p, int64_t i, int dtype) {
  switch (dtype) {
    case XK_F64:
      return ((const double*)p)[i];
    case XK_BF16:
      return widen(((const bf16*)p)[i]);
    case XK_F16:
      return widen(((const f16*)p)[i]);
    default:
      return ((const float*)p)[i];
  }
}
void store_scalar(void* p, int64_t i, int dtype, double x) {
  switch (dtype) {
    case XK_F64:
      ((double*)p)[i] = x;
      break;
    case XK_BF16:
      narrow((bf16*)p + i, float(x));
      break;
    case XK_F16:
      narrow((f16*)p + i, float(x));
      break;
    default:
      ((float*)p)[i] = float(x);
  }
}

template <class T>
void set_mask(Pass<T>& pass, const xk_mask& mask, int64_t b) {
  if (!mask.data) return;
  pass.mask = mask.data + b * mask.stride_b;
  pass.mask_stride = mask.stride_n;
}

// ---------------------------------------------------------------------------------------------------------- gram

template <class T>
int gram(const xk_gram_args& p) {
  int da = int(p.dim_a), db = int(p.dim_b), lda = padded<T>(da), ldb = padded<T>(db), widest = da > db ? da : db;
  if (!p.batch || !p.heads) return XK_OK;
  size_t size = (size_t)da * ldb + lda + ldb, scratch = pass_scratch<T>(widest);
  Plan plan(p.batch, p.heads, p.tokens, widest, block_tokens<T>(widest), sizeof(T));
  Buffer<T> sums(p.batch * p.heads * plan.chunks * size), own(p.threads * scratch);
  if (!sums.data || !own.data) return XK_OUT_OF_MEMORY;

  parallel_for(plan.units(), p.threads, [&](int64_t index, int thread) {
    Unit u(plan, index);
    auto partial = [&](int64_t h) { return sums.data + ((u.b * p.heads + h) * plan.chunks + u.s) * size; };
    for (int64_t h = u.h0; h < u.h1; ++h) zero(partial(h), size);
    sweep<T>(plan, u, widest, own.data + thread * scratch, [&](int64_t h) {
      Pass<T> pass;
      pass.operands = p.symmetric ? 1 : 2;
      pass.in[0] = operand(p.a, u.b, h, da);
      if (!p.symmetric) pass.in[1] = operand(p.b, u.b, h, db);
      T* g = partial(h);
      pass.gram = {0, p.symmetric ? 0 : 1, g};
      pass.ssq[0] = g + (size_t)da * ldb;
      if (!p.symmetric) pass.ssq[1] = pass.ssq[0] + lda;
      set_mask(pass, p.mask, u.b);
      return pass;
    });
  });
  parallel_for(p.batch * p.heads, p.threads, [&](int64_t bh, int) {
    T* g = sums.data + bh * plan.chunks * size;
    sum_chunks(g, plan.chunks, size);
    T *out = (T*)p.g + bh * da * db, *ssq = g + (size_t)da * ldb;
    for (int i = 0; i < da; ++i)
      for (int j = 0; j < db; ++j)
        out[(ptrdiff_t)i * db + j] = p.symmetric && j > i ? g[(ptrdiff_t)j * ldb + i] : g[(ptrdiff_t)i * ldb + j];
    memcpy((T*)p.ssq_a + bh * da, ssq, da * sizeof(T));
    memcpy((T*)p.ssq_b + bh * db, p.symmetric ? ssq : ssq + lda, db * sizeof(T));
  });
  return XK_OK;
}

// ------------------------------------------------------------------------------------------------- channel mix

template <class T>
int channel_mix(const xk_channel_mix_args& p) {
  int in = int(p.dim_in), in2 = p.x2.data ? int(p.dim_in2) : 0, out = int(p.dim_out), ld = padded<T>(out);
  if (!p.batch || !p.heads) return XK_OK;
  int widest = in > out ? in : out;
  if (in2 > widest) widest = in2;
  size_t size = (size_t)(in + in2 + 2) * ld, scratch = pass_scratch<T>(widest);
  Plan plan(p.batch, p.heads, p.tokens, widest, block_tokens<T>(widest), sizeof(T));
  Buffer<T> operands(p.batch * p.heads * size), own(p.threads * scratch);
  if (!operands.data || !own.data) return XK_OUT_OF_MEMORY;

  parallel_for(p.batch * p.heads, p.threads, [&](int64_t bh, int) {
    int64_t b = bh / p.heads, h = bh % p.heads;
    T* w = operands.data + bh * size;
    zero(w, size);
    auto element = [&](const xk_tensor& t, int64_t row, int64_t column) {
      return T(load_scalar(t.data, b * t.stride_b + h * t.stride_h + row * t.stride_n + column * t.stride_d, t.dtype));
    };
    for (int i = 0; i < in; ++i)
      for (int o = 0; o < out; ++o) w[(ptrdiff_t)i * ld + o] = element(p.weight, o, i);
    for (int i = 0; i < in2; ++i)
      for (int o = 0; o < out; ++o) w[(ptrdiff_t)(in + i) * ld + o] = element(p.weight2, o, i);
    T* bias = w + (size_t)(in + in2) * ld;
    for (int o = 0; o < out; ++o) {
      if (p.bias.data) bias[o] = element(p.bias, 0, o);
      bias[ld + o] = p.scale.data ? element(p.scale, 0, o) : T(1);
    }
  });
  parallel_for(plan.units(), p.threads, [&](int64_t index, int thread) {
    Unit u(plan, index);
    sweep<T>(plan, u, widest, own.data + thread * scratch, [&](int64_t h) {
      Pass<T> pass;
      const T* w = operands.data + (u.b * p.heads + h) * size;
      Mix<T>& mix = pass.mix[0];
      pass.mixes = 1;
      pass.in[pass.operands] = operand(p.x, u.b, h, in);
      mix.x = mix.ahead = pass.operands++;
      mix.w = w;
      if (in2) {
        pass.in[pass.operands] = operand(p.x2, u.b, h, in2);
        mix.x2 = pass.operands++;
        mix.w2 = w + (size_t)in * ld;
      }
      if (p.add.data) {
        pass.in[pass.operands] = operand(p.add, u.b, h, out);
        mix.add = pass.operands++;
        mix.scale = w + (size_t)(in + in2 + 1) * ld;
      }
      if (p.bias.data) mix.bias = w + (size_t)(in + in2) * ld;
      mix.y = operand(p.y, u.b, h, out);
      return pass;
    });
  });
  return XK_OK;
}

// ---------------------------------------------------------------------------------------------------------- xfa

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
  int dim, ld, block;
  bool key_value, token_norm;
  size_t matrix, sums_size, scratch;
  Plan plan;

  explicit Xfa(const xk_xfa_args& p)
      : p(p),
        dim(int(p.dim)),
        ld(padded<T>(dim)),
        block(block_tokens<T>(dim)),
        key_value(p.map == XK_KEY_VALUE),
        token_norm(p.norm == XK_TOKEN_NORM),
        matrix((size_t)dim * ld),
        sums_size(matrix + 2 * ld),
        scratch(pass_scratch<T>(dim)),
        plan(p.batch, p.heads, p.tokens, dim, block, sizeof(T)) {}

  Pass<T> empty_pass(int64_t b) const {
    Pass<T> pass;
    set_mask(pass, p.mask, b);
    pass.eps = T(p.eps);
    return pass;
  }
  Operand in(const xk_tensor& t, int64_t b, int64_t h, bool normalised) const {
    return operand(t, b, h, dim, normalised && !token_norm);
  }

  // Gram of k with q (query_key) or with v (key_value), and the sums of squares of q and k.
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

  // query_key: dA^T[j,i] = sum_n v[n,j] dout[n,i], and dv = dout A on the way. key_value: dW = gram(q, dout).
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
  // The gradients of q and k (and v for key_value). m0, m1, m2: dG^T, dG for query_key; dG, dG^T, W^T for key_value.
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
    } else {
      dq.unit = 0;
      dk.unit = 1;
    }
    dq.y = in(p.dq, b, h, false);
    dk.y = in(p.dk, b, h, false);
    return pass;
  }

  int forward() const {
    // One chunk: a unit goes from Gram to output alone, its matrices in its thread's cache. Several: three steps.
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

  // Per head: a (A^T, then dG), t (A; key_value: W^T) and the scales; the summed dA^T becomes dG^T in place.
  int backward() const {
    bool alone = plan.chunks == 1;
    size_t operands_size = 2 * matrix + 2 * ld;
    size_t slots = alone ? p.threads * plan.group : p.batch * p.heads;
    Buffer<T> sums((alone ? slots : slots * plan.chunks) * matrix), operands(slots * operands_size);
    Buffer<T> own(p.threads * (scratch + ld)), dt(p.batch * p.heads);
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
      if (!key_value) transpose(m, m + matrix, dim, ld);
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
      for (int64_t b = 0; b < p.batch; ++b) total += double(dt.data[b * p.heads + h]);
      store_scalar(p.dtemperature.data, h * p.dtemperature.stride, p.dtemperature.dtype, total);
    }
    return XK_OK;
  }
};

}  // namespace

int run_gram(const xk_gram_args* p) { return p->a.dtype == XK_F64 ? gram<double>(*p) : gram<float>(*p); }
int run_channel_mix(const xk_channel_mix_args* p) {
  return p->x.dtype == XK_F64 ? channel_mix<double>(*p) : channel_mix<float>(*p);
}
int run_xfa_forward(const xk_xfa_args* p) {
  return p->q.dtype == XK_F64 ? Xfa<double>(*p).forward() : Xfa<float>(*p).forward();
}
int run_xfa_backward(const xk_xfa_args* p) {
  return p->q.dtype == XK_F64 ? Xfa<double>(*p).backward() : Xfa<float>(*p).backward();
}

}  // namespace XK_LEVEL
}  // namespace xk
