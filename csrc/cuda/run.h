// Implementation of backend.h: converts the structs of the C API to kernel launches.
#pragma once

#include "backend.h"
#include "fused.h"
#include "heads.h"
#include "passes.h"

namespace xk::cuda {

template <class T>
int64_t Backend<T>::gram(const xk_gram_args& a, const xk_cuda_launch& l, bool measure) {
  using S = Sum<T>;
  const Device& device = use_device(l.device);
  Sizes n{a.batch, a.heads, a.tokens};
  int64_t heads = a.batch * a.heads, size = a.dim_a * a.dim_b;
  Split split = split_gram<T>(a.tokens, heads, a.dim_a, a.dim_b, device);
  Workspace workspace(l.workspace);
  SumArgs<S> sum = {{},
                    {static_cast<S*>(a.g), static_cast<S*>(a.ssq_a), static_cast<S*>(a.ssq_b)},
                    {heads * size, heads * a.dim_a, heads * a.dim_b},
                    split.parts};
  S* parts[3];
  for (int i = 0; i < 3; ++i)
    sum.from[i] = parts[i] = split.parts > 1 ? workspace.take<S>(split.parts * sum.count[i]) : sum.to[i];
  if (measure) return workspace.used();

  GramArgs<S> p = {};
  p.x[0] = operand(a.a, n, a.dim_a, sizeof(T));
  p.x[1] = a.symmetric ? p.x[0] : operand(a.b, n, a.dim_b, sizeof(T));
  p.mask = mask_of(a.mask);
  p.batch = a.batch, p.heads = a.heads, p.tokens = a.tokens, p.parts = split.parts, p.chunk = split.chunk;
  p.g = parts[0], p.ssq_a = parts[1], p.ssq_b = parts[2];
  p.g_step = size, p.ssq_a_step = a.dim_a, p.ssq_b_step = a.dim_b;
  p.symmetric = a.symmetric;
  p.squares = 1;
  launch_gram<T>(p, l.tf32, l.stream);
  if (split.parts > 1) {
    int64_t blocks = cdiv(sum.count[0], kSumThreads);
    launch("sum", sum_kernel<S>, sum, blocks < 4096 ? blocks : 4096, kSumThreads, 0, l.stream);
  }
  return 0;
}

template <class T>
void Backend<T>::channel_mix(const xk_channel_mix_args& a, const xk_cuda_launch& l) {
  const Device& device = use_device(l.device);
  Sizes n{a.batch, a.heads, a.tokens};
  auto wide = [](const xk_tensor& t) { return t.dtype == XK_F32 || t.dtype == XK_F64; };
  MixArgs<T> p = {};
  p.batch = a.batch, p.heads = a.heads, p.tokens = a.tokens;
  p.outputs = 1;
  MixOutput<T>& out = p.out[0];
  out.to = result<T>(a.y, n, a.dim_out);
  out.row_norm = out.project = out.add = kNone;
  auto add_term = [&](const xk_tensor& x, const xk_tensor& w, int64_t features) {
    p.x[p.operands] = operand(x, n, features, sizeof(T));
    out.operand[out.terms] = p.operands++;
    out.weight[out.terms++] = {w.data, w.stride_b, w.stride_h, w.stride_d, w.stride_n, wide(w), (int32_t)features};
  };
  add_term(a.x, a.weight, a.dim_in);
  if (a.dim_in2) add_term(a.x2, a.weight2, a.dim_in2);
  if (a.add.data) {
    p.x[p.operands] = operand(a.add, n, a.dim_out, sizeof(T));
    out.add = p.operands++;
  }
  auto vector = [&](const xk_tensor& t) { return Vector{t.data, t.stride_b, t.stride_h, t.stride_d, wide(t), 1, 0}; };
  out.scale = vector(a.scale);
  out.bias = vector(a.bias);
  // 32-bit weights are not rounded to 16 bits
  bool exact = kShort<T> && (wide(a.weight) || (a.dim_in2 && wide(a.weight2)));
  launch_mix(p, exact, l.tf32, device, l.stream);
}

// Sizes, operands and options of a forward or backward call.
template <class T>
struct Call {
  const xk_xfa_args& a;
  const xk_cuda_launch& l;
  const Device& device;
  Sizes n;
  int64_t heads, map;  // heads: batch * heads; map: elements of a map
  bool key_value, token_norm, feature_norm;
  MapOptions options;

  Call(const xk_xfa_args& a_, const xk_cuda_launch& l_)
      : a(a_),
        l(l_),
        device(use_device(l_.device)),
        n{a_.batch, a_.heads, a_.tokens},
        heads(a_.batch * a_.heads),
        map(a_.dim * a_.dim),
        key_value(a_.map == XK_KEY_VALUE),
        token_norm(a_.norm == XK_TOKEN_NORM),
        feature_norm(a_.norm == XK_FEATURE_NORM),
        options{key_value, token_norm, a_.activation == XK_SOFTMAX && !key_value, a_.eps} {}

  Operand tokens(const xk_tensor& t) const { return operand(t, n, a.dim, sizeof(T)); }
  PerHead temperature() const { return {a.temperature.data, a.temperature.stride, a.temperature.dtype}; }
  Split split() const { return split_gram<T>(a.tokens, heads, a.dim, a.dim, device); }
  GramArgs<Sum<T>> gram(const xk_tensor& x, const xk_tensor& y, const Split& split, Sum<T>* to, int64_t step) const {
    GramArgs<Sum<T>> p = {};
    p.x[0] = tokens(x), p.x[1] = tokens(y);
    p.mask = mask_of(a.mask);
    p.batch = a.batch, p.heads = a.heads, p.tokens = a.tokens, p.parts = split.parts, p.chunk = split.chunk;
    p.g = to, p.ssq_a = to + map, p.ssq_b = to + map + a.dim;
    p.g_step = p.ssq_a_step = p.ssq_b_step = step;
    p.eps = a.eps;
    return p;
  }
  MapArgs<Sum<T>> maps(const Split& split, const Sum<T>* partial, int64_t step) const {
    MapArgs<Sum<T>> p = {};
    p.options = options;
    p.temperature = temperature();
    p.batch = a.batch, p.heads = a.heads, p.parts = split.parts;
    p.dim = (int32_t)a.dim;
    p.partial = partial;
    p.step = step;
    p.stats = static_cast<Sum<T>*>(a.stats);
    return p;
  }
  void launch_map(const char* name, void (*kernel)(MapArgs<Sum<T>>), const MapArgs<Sum<T>>& p) const {
    Arena arena(nullptr);
    MapLayout<Sum<T>>(arena, p.dim);
    launch(name, kernel, p, heads * cdiv(a.dim, kMapColumns), kMapThreads, arena.used(), l.stream);
  }
  MixArgs<T> mix() const {
    MixArgs<T> p = {};
    p.mask = mask_of(a.mask);
    p.batch = a.batch, p.heads = a.heads, p.tokens = a.tokens;
    p.eps = a.eps;
    return p;
  }
  // An output of one term: operand number x times the map map_.
  MixOutput<T> output(const xk_tensor& to, int x, const Sum<T>* map_, bool transposed) const {
    MixOutput<T> out = {};
    out.to = result<T>(to, n, a.dim);
    out.terms = 1;
    out.operand[0] = x;
    out.weight[0] = {map_, a.heads * map, map, transposed ? 1 : a.dim, transposed ? a.dim : 1, 1, (int32_t)a.dim};
    out.row_norm = out.project = out.add = kNone;
    return out;
  }

  // Launches the fused kernel (not if `measure`); returns false if the device cannot run it.
  template <class Math, int kColumns>
  bool fused_of(const char* name, void (*kernel)(FusedArgs<T>), int tiles, int maps, FusedArgs<T>& p,
                bool measure) const {
    auto bytes = [&](int cluster) {
      p.rows = (int32_t)(cdiv(cdiv(a.tokens, cluster), 16) * 16);
      Arena arena(nullptr);
      FusedLayout<Math, kColumns>(arena, p.rows, tiles, maps);
      return arena.used();
    };
    int most = device.capability >= 90 ? kMostBlocks : 1, cluster = 1;
    while (cluster < most && bytes(cluster) > device.shared_bytes) cluster *= 2;
    if (bytes(cluster) > device.shared_bytes) return false;
    // larger clusters if multiprocessors would be idle, as long as each block has more than 32 tokens
    while (cluster < 8 && cluster < most && a.tokens > 64 * cluster && heads * cluster * 2 <= device.processors)
      cluster *= 2;
    int64_t shared = bytes(cluster);
    if (cluster > 1 && !can_cluster(reinterpret_cast<Kernel>(kernel), l.device, cluster, kFusedThreads, shared))
      return false;
    if (!measure) launch(name, kernel, p, heads * cluster, kFusedThreads, shared, l.stream, cluster);
    return true;
  }

  // Runs forward or backward in one launch; returns whether that is possible. `measure`: only checks. With 128 columns,
  // the maps do not fit in shared memory of any device, except in the forward of 16-bit dtypes, which has two.
  template <bool kBackward>
  bool fused(FusedArgs<T> p, bool measure) const {
    constexpr int kWidest = kShort<T> && !kBackward ? 128 : 64;
    if constexpr (sizeof(T) == 8) {
      return false;
    } else {
      if (feature_norm || a.tokens == 0 || a.dim > kWidest || l.path == XK_TWO_PASSES) return false;
      // more tokens than bytes of shared memory cannot fit; this also bounds the sizes that layouts compute in 32 bits
      if (a.tokens > (int64_t)kMostBlocks * device.shared_bytes) return false;
      p.mask = mask_of(a.mask);
      p.options = options;
      p.temperature = temperature();
      p.heads = a.heads, p.tokens = a.tokens;
      p.dim = (int32_t)a.dim;
      p.stats = static_cast<Sum<T>*>(a.stats);
      const xk_tensor* x[4] = {&a.q, &a.k, &a.v, &a.dout};
      for (int i = 0; i < (kBackward ? 4 : 3); ++i) p.x[i] = tokens(*x[i]);
      return with_math<T>(l.tf32, [&](auto math) {
        using Math = decltype(math);
        auto run = [&](auto columns) {
          constexpr int kColumns = decltype(columns)::value;
          if constexpr (kBackward)
            return fused_of<Math, kColumns>("fused_backward", fused_backward_kernel<T, Math, kColumns>, 4, 2, p,
                                            measure);
          else
            return fused_of<Math, kColumns>("fused_forward", fused_forward_kernel<T, Math, kColumns>, 3, 1, p, measure);
        };
        if constexpr (kWidest > 64)
          if (a.dim > 64) return run(std::integral_constant<int, 128>{});
        if (a.dim > 32) return run(std::integral_constant<int, 64>{});
        return run(std::integral_constant<int, 32>{});
      });
    }
  }
  void refuse_two_passes() const {
    if (l.path == XK_ONE_LAUNCH)
      fail("one launch cannot hold " + std::to_string(a.tokens) + " tokens of " + std::to_string(a.dim) + " features" +
           (feature_norm ? ": norms over features take two passes" : ""));
  }
};

template <class T>
int64_t Backend<T>::forward(const xk_xfa_args& a, const xk_cuda_launch& l, bool measure) {
  using S = Sum<T>;
  Call<T> call(a, l);
  FusedArgs<T> fused = {};
  if (!measure) fused.to[0] = result<T>(a.out, call.n, a.dim);
  if (call.template fused<false>(fused, measure)) return 0;
  call.refuse_two_passes();

  Split split = call.split();
  int64_t record = call.map + 2 * a.dim;
  Workspace workspace(l.workspace);
  S *partial = workspace.take<S>(split.parts * call.heads * record), *map = workspace.take<S>(call.heads * call.map);
  if (measure) return workspace.used();

  GramArgs<S> g = call.gram(a.k, call.key_value ? a.v : a.q, split, partial, record);
  g.squares = call.token_norm;
  if (call.token_norm && call.key_value) g.x[2] = call.tokens(a.q);
  g.norm_a = call.feature_norm;
  g.norm_b = call.feature_norm && !call.key_value;
  launch_gram<T>(g, l.tf32, l.stream);

  MapArgs<S> m = call.maps(split, partial, record);
  m.p = map;
  call.launch_map("map_forward", map_forward_kernel<S>, m);

  MixArgs<T> y = call.mix();
  y.operands = y.outputs = 1;
  y.x[0] = call.tokens(call.key_value ? a.q : a.v);
  y.out[0] = call.output(a.out, 0, map, false);
  if (call.feature_norm && call.key_value) y.out[0].row_norm = 0;
  launch_mix(y, false, l.tf32, call.device, l.stream);
  return 0;
}

template <class T>
int64_t Backend<T>::backward(const xk_xfa_args& a, const xk_cuda_launch& l, bool measure) {
  using S = Sum<T>;
  Call<T> call(a, l);
  int pieces = (int)cdiv(a.dim, kMapColumns);
  Workspace workspace(l.workspace);
  S* dtemperature = workspace.take<S>(pieces * call.heads);
  FusedArgs<T> fused = {};
  fused.dtemperature = dtemperature;
  const xk_tensor* to[3] = {&a.dq, &a.dk, &a.dv};
  if (!measure)
    for (int i = 0; i < 3; ++i) fused.to[i] = result<T>(*to[i], call.n, a.dim);
  auto sum_dtemperature = [&](int64_t count) {
    TemperatureArgs<S> t{
        dtemperature, count, a.heads, {a.dtemperature.data, a.dtemperature.stride, a.dtemperature.dtype}};
    int64_t blocks = cdiv(a.heads, kMapThreads);
    launch("temperature", temperature_kernel<S>, t, blocks < 1024 ? blocks : 1024, kMapThreads, 0, l.stream);
  };
  if (call.template fused<true>(fused, measure)) {
    if (!measure) sum_dtemperature(a.batch);
    return workspace.used();
  }
  call.refuse_two_passes();

  Split split = call.split();
  S* partial = workspace.take<S>(split.parts * call.heads * call.map);
  S *map_p = workspace.take<S>(call.heads * call.map), *map_q = workspace.take<S>(call.heads * call.map);
  S *scale_q = workspace.take<S>(pieces * call.heads * a.dim),
    *scale_k = workspace.take<S>(pieces * call.heads * a.dim);
  if (measure) return workspace.used();

  GramArgs<S> g = call.gram(call.key_value ? a.q : a.v, a.dout, split, partial, call.map);
  g.norm_a = call.feature_norm && call.key_value;
  launch_gram<T>(g, l.tf32, l.stream);

  MapArgs<S> m = call.maps(split, partial, call.map);
  m.p = map_p, m.q = map_q, m.scale_q = scale_q, m.scale_k = scale_k, m.dtemperature = dtemperature;
  call.launch_map("map_backward", map_backward_kernel<S>, m);

  enum { kQ, kK, kDout, kV };  // operands; kV only for key_value
  MixArgs<T> y = call.mix();
  y.outputs = 3;
  y.operands = call.key_value ? 4 : 3;
  const xk_tensor* x[4] = {&a.q, &a.k, &a.dout, &a.v};
  for (int i = 0; i < y.operands; ++i) y.x[i] = call.tokens(*x[i]);
  if (call.key_value) {
    y.out[0] = call.output(a.dq, kDout, map_q, true);
    y.out[1] = call.output(a.dk, kV, map_p, true);
    y.out[2] = call.output(a.dv, kK, map_p, false);
  } else {
    y.out[0] = call.output(a.dq, kK, map_p, false);
    y.out[1] = call.output(a.dk, kQ, map_p, true);
    y.out[2] = call.output(a.dv, kDout, map_q, true);
  }
  if (call.token_norm) {
    int64_t step = call.heads * a.dim;
    y.out[0].add = kQ, y.out[1].add = kK;
    y.out[0].scale = {scale_q, a.heads * a.dim, a.dim, 1, 1, call.key_value ? pieces : 1, step};
    y.out[1].scale = {scale_k, a.heads * a.dim, a.dim, 1, 1, pieces, step};
  } else if (call.feature_norm) {
    y.out[0].project = kQ, y.out[1].project = kK;
    if (call.key_value) {
      y.out[2].row_norm = kK;
    } else {
      y.out[0].row_norm = kK, y.out[1].row_norm = kQ;
    }
  }
  launch_mix(y, false, l.tf32, call.device, l.stream);
  sum_dtemperature(a.batch * pieces);
  return workspace.used();
}

}  // namespace xk::cuda
