// The entry points of one instruction level. This file is compiled once per level, named by XK_LEVEL, and must not
// instantiate anything outside its own namespace: the linker could keep a weak symbol built for a newer level for all
// levels.
#include "../include/xformer_kernels.h"
#include "depthwise.h"
#include "layer_maps.h"
#include "linear.h"
#include "linear_attention.h"
#include "xfa.h"

namespace xk {
namespace XK_LEVEL {
namespace {

// ---------------------------------------------------------------------------------------------------------- gram

// One row per (batch, head), padded with zeros to whole vectors; empty if data is null.
template <class T>
struct Padded {
  int dim, ld;
  Buffer<T> rows;
  Padded(const void* data, int64_t count, int dim) : dim(dim), ld(padded<T>(dim)), rows(data ? count * ld : 0) {
    if (!data || !rows.data) return;
    zero(rows.data, count * ld);
    for (int64_t i = 0; i < count; ++i) memcpy(rows.data + i * ld, (const T*)data + i * dim, dim * sizeof(T));
  }
  const T* operator[](int64_t i) const { return rows.data + i * ld; }
};

template <class T>
int gram(const xk_gram_args& p, const xk_layer_gram_args* layer = nullptr) {
  int da = int(p.dim_a), db = int(p.dim_b), lda = padded<T>(da), ldb = padded<T>(db), widest = da > db ? da : db;
  if (!p.batch || !p.heads) return XK_OK;
  // per head and chunk: the matrix, then the sums of squares (layer: the sums) of the features of a and of b
  size_t size = (size_t)da * ldb + lda + ldb, scratch = pass_scratch<T>(widest);
  Padded<T> center(layer ? layer->prologue.center : nullptr, p.batch * p.heads, db);
  Plan plan(p.batch, p.heads, p.tokens, widest, block_tokens<T>(widest), sizeof(T));
  Buffer<T> sums(p.batch * p.heads * plan.chunks * size), own(p.threads * scratch);
  if (!sums.data || !own.data || !center.rows.data) return XK_OUT_OF_MEMORY;

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
      if (layer) {
        int b = p.symmetric ? 0 : 1;
        pass.in[b].layer_norm = layer->prologue.layer_norm;
        pass.eps = T(layer->prologue.eps);
        if (layer->prologue.center) pass.center[b] = center[u.b * p.heads + h];
        if (!p.symmetric) pass.sums[0] = g + (size_t)da * ldb;
        pass.sums[b] = g + (size_t)da * ldb + lda;
      } else if (!p.symmetric) {  // if symmetric, the sums of squares are the diagonal
        pass.ssq[0] = g + (size_t)da * ldb;
        pass.ssq[1] = pass.ssq[0] + lda;
      }
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
    for (int i = 0; i < da && p.symmetric; ++i) {
      if (!layer) ssq[lda + i] = g[(ptrdiff_t)i * ldb + i];
      ssq[i] = ssq[lda + i];
    }
    T *to_a = (T*)(layer ? layer->sum_a : p.ssq_a), *to_b = (T*)(layer ? layer->sum_b : p.ssq_b);
    if (to_a) memcpy(to_a + bh * da, ssq, da * sizeof(T));
    memcpy(to_b + bh * db, ssq + lda, db * sizeof(T));
  });
  return XK_OK;
}

// ------------------------------------------------------------------------------------------------- channel mix

template <class T>
int channel_mix(const xk_channel_mix_args& p, const xk_layer_mix_args* layer = nullptr) {
  int in = int(p.dim_in), in2 = int(p.dim_in2), out = int(p.dim_out), ld = padded<T>(out);
  if (!p.batch || !p.heads || !p.tokens) return XK_OK;
  int widest = in > out ? in : out;
  if (in2 > widest) widest = in2;
  size_t size = (size_t)(in + in2 + 2) * ld, scratch = pass_scratch<T>(widest);
  Plan plan(p.batch, p.heads, p.tokens, widest, block_tokens<T>(widest), sizeof(T));
  Buffer<T> operands(p.batch * p.heads * size), own(p.threads * scratch);
  Padded<T> center(layer ? layer->prologue.center : nullptr, p.batch * p.heads, in2 ? in2 : in);
  if (!operands.data || !own.data || !center.rows.data) return XK_OUT_OF_MEMORY;

  const bool by_panels = !channel_major(p.y);
  const Cut panels(ld / VL<T>, by_panels ? kMaxNR : ld / VL<T>);  // otherwise one panel
  parallel_for(p.batch * p.heads * panels.parts, p.threads, [&](int64_t index, int) {
    const int64_t bh = index / panels.parts, b = bh / p.heads, h = bh % p.heads;
    const int panel = int(index % panels.parts);
    T* w = operands.data + bh * size;
    auto pack = [&](const xk_tensor& t, int in, T* w) {
      with_any_storage(t.dtype, [&](auto* storage) {
        auto weight = (decltype(storage))t.data + b * t.stride_b + h * t.stride_h;
        pack_panel(weight, t.stride_n, t.stride_d, in, out, panels, panel, w);
      });
    };
    pack(p.weight, in, w);
    if (in2) pack(p.weight2, in2, w + (size_t)in * ld);
    if (panel) return;
    T* bias = w + (size_t)(in + in2) * ld;
    zero(bias, 2 * ld);
    auto element = [&](const xk_tensor& t, int64_t column) {
      return T(load_scalar(t.data, b * t.stride_b + h * t.stride_h + column * t.stride_d, t.dtype));
    };
    for (int o = 0; o < out; ++o) {
      if (p.bias.data) bias[o] = element(p.bias, o);
      bias[ld + o] = p.scale.data ? element(p.scale, o) : T(1);
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
      mix.by_panels = by_panels;
      if (in2) {
        pass.in[pass.operands] = operand(p.x2, u.b, h, in2);
        mix.x2 = pass.operands++;
        mix.w2 = w + (size_t)in * ld;
      }
      if (layer) {
        int last = pass.operands - 1;
        pass.in[last].layer_norm = layer->prologue.layer_norm;
        pass.eps = T(layer->prologue.eps);
        if (layer->prologue.center) pass.center[last] = center[u.b * p.heads + h];
        if (layer->differentiate && layer->prologue.layer_norm) mix.unit = last;
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

}  // namespace

int run_gram(const xk_gram_args* p) {
  if (p->dim_a < 1 || p->dim_b < 1) return XK_BAD_ARGUMENT;
  return p->a.dtype == XK_F64 ? gram<double>(*p) : gram<float>(*p);
}
int run_channel_mix(const xk_channel_mix_args* p) {
  if (p->dim_in < 1 || p->dim_out < 1 || p->dim_in2 < 0) return XK_BAD_ARGUMENT;
  return p->x.dtype == XK_F64 ? channel_mix<double>(*p) : channel_mix<float>(*p);
}
int run_layer_gram(const xk_layer_gram_args* p) {
  const xk_gram_args& g = p->gram;
  if (g.dim_a < 1 || g.dim_b < 1) return XK_BAD_ARGUMENT;
  return g.a.dtype == XK_F64 ? gram<double>(g, p) : gram<float>(g, p);
}
int run_layer_mix(const xk_layer_mix_args* p) {
  const xk_channel_mix_args& m = p->mix;
  if (m.dim_in < 1 || m.dim_out < 1 || m.dim_in2 < 0) return XK_BAD_ARGUMENT;
  if (p->differentiate && m.dim_out != (m.dim_in2 ? m.dim_in2 : m.dim_in)) return XK_BAD_ARGUMENT;
  return m.x.dtype == XK_F64 ? channel_mix<double>(m, p) : channel_mix<float>(m, p);
}
static bool valid(const xk_layer_maps_args& p) {
  return p.dim > 0 && p.features > 0 && (p.dtype == XK_F32 || p.dtype == XK_F64);
}
int run_layer_maps(const xk_layer_maps_args* p) {
  if (!valid(*p)) return XK_BAD_ARGUMENT;
  return p->dtype == XK_F64 ? LayerMaps<double>(*p).forward() : LayerMaps<float>(*p).forward();
}
int run_layer_maps_backward(const xk_layer_maps_args* p) {
  if (!valid(*p)) return XK_BAD_ARGUMENT;
  return p->dtype == XK_F64 ? LayerMaps<double>(*p).backward() : LayerMaps<float>(*p).backward();
}
int run_xfa_forward(const xk_xfa_args* p) {
  if (p->dim < 1) return XK_BAD_ARGUMENT;
  return p->q.dtype == XK_F64 ? Xfa<double>(*p).forward() : Xfa<float>(*p).forward();
}
int run_xfa_backward(const xk_xfa_args* p) {
  if (p->dim < 1) return XK_BAD_ARGUMENT;
  return p->q.dtype == XK_F64 ? Xfa<double>(*p).backward() : Xfa<float>(*p).backward();
}

int run_linear_attention_forward(const xk_linear_attention_args* p) {
  if (p->dim < 1 || p->dim_v < 1) return XK_BAD_ARGUMENT;
  return p->q.dtype == XK_F64 ? LinearAttention<double>(*p).forward() : LinearAttention<float>(*p).forward();
}
int run_linear_attention_backward(const xk_linear_attention_args* p) {
  if (p->dim < 1 || p->dim_v < 1) return XK_BAD_ARGUMENT;
  return p->q.dtype == XK_F64 ? LinearAttention<double>(*p).backward() : LinearAttention<float>(*p).backward();
}
int run_linear(const xk_linear_args* p) {
  if (p->dim_in < 1 || p->dim_out < 1 || (p->packed && p->norm.variance)) return XK_BAD_ARGUMENT;
  return p->tokens ? Linear(*p).run() : int(XK_OK);
}
int run_pack_linear(const xk_pack_linear_args* p) {
  if (p->dim_in < 1 || p->dim_out < 1) return XK_BAD_ARGUMENT;
  pack_linear(*p);
  return XK_OK;
}
int run_depthwise(const xk_depthwise_args* p) { return p->channels < 1 ? int(XK_BAD_ARGUMENT) : depthwise(*p); }

}  // namespace XK_LEVEL
}  // namespace xk
