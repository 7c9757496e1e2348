// Implementation of backend.h: converts the structs of the C API to kernel launches.
#pragma once

#include "backend.h"
#include "fragment_pass.h"
#include "fused.h"
#include "heads.h"

namespace xk::cuda {

constexpr int kWidest = 64;  // features

// Sizes, operands and options of a forward or backward call.
template <class T>
struct Call {
  const xk_xfa_args& a;
  const xk_cuda_launch& l;
  const Device& device;
  Sizes n;
  int64_t heads, map;  // heads: batch * heads; map: elements of a map
  bool key_value, token_norm;
  Mask mask;
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
        mask{a_.mask.data, a_.mask.stride_b, a_.mask.stride_n},
        options{key_value, token_norm, a_.activation == XK_SOFTMAX && !key_value, a_.eps} {
    if (a.dim < 1 || a.dim > kWidest)
      throw Failure{XK_BAD_ARGUMENT, std::to_string(a.dim) + " features, the kernels take 1 to 64"};
    if (a.norm == XK_FEATURE_NORM) throw Failure{XK_BAD_ARGUMENT, "the kernels have no norms over features"};
    if (a.temperature.dtype == XK_F64) throw Failure{XK_BAD_ARGUMENT, "the kernels read no float64 temperature"};
  }

  Operand tokens(const xk_tensor& t) const { return operand(t, n, a.dim, sizeof(T)); }
  PerHead temperature() const { return {a.temperature.data, a.temperature.stride, a.temperature.dtype}; }

  // Launches the fused kernel (not if `measure`); returns false if the device cannot run it.
  template <int kColumns>
  bool fused_of(const char* name, void (*kernel)(FusedArgs<T>), int tiles, int maps, FusedArgs<T>& p,
                bool measure) const {
    auto bytes = [&](int cluster) {
      p.rows = (int32_t)(cdiv(cdiv(a.tokens, cluster), 16) * 16);
      Arena arena(nullptr);
      FusedLayout<T, kColumns>(arena, p.rows, tiles, maps);
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

  // Runs forward or backward in one launch; returns whether that is possible. `measure`: only checks.
  template <bool kBackward>
  bool fused(FusedArgs<T> p, bool measure) const {
    if (a.tokens == 0 || l.path == XK_TWO_PASSES) return false;
    // more tokens than bytes of shared memory cannot fit; this also bounds the sizes that layouts compute in 32 bits
    if (a.tokens > (int64_t)kMostBlocks * device.shared_bytes) return false;
    p.mask = mask;
    p.options = options;
    p.temperature = temperature();
    p.heads = a.heads, p.tokens = a.tokens;
    p.dim = (int32_t)a.dim;
    p.stats = static_cast<float*>(a.stats);
    const xk_tensor* x[4] = {&a.q, &a.k, &a.v, &a.dout};
    for (int i = 0; i < (kBackward ? 4 : 3); ++i) p.x[i] = tokens(*x[i]);
    auto run = [&](auto columns) {
      if constexpr (kBackward)
        return fused_of<columns>("fused_backward", fused_backward_kernel<T, columns>, 4, 2, p, measure);
      else
        return fused_of<columns>("fused_forward", fused_forward_kernel<T, columns>, 3, 1, p, measure);
    };
    return a.dim > 32 ? run(std::integral_constant<int, 64>{}) : run(std::integral_constant<int, 32>{});
  }

  // Fails if one launch was asked for, or if one of these is not aligned for two passes.
  void require_two_passes(std::initializer_list<const xk_tensor*> tensors) const {
    if (l.path == XK_ONE_LAUNCH)
      fail("one launch cannot hold " + std::to_string(a.tokens) + " tokens of " + std::to_string(a.dim) + " features");
    for (const xk_tensor* t : tensors)
      if (!is_aligned(*t, n, a.dim, sizeof(T), l.padded))
        throw Failure{XK_UNALIGNED, "two passes take tokens at multiples of 16 bytes"};
  }

  Split split() const { return split_gram<T>(a.tokens, heads, a.dim, device); }
  // Sums over the tokens of x and y; see GramArgs.
  void gram(const xk_tensor& x, const xk_tensor& y, bool squares, const Split& split, float* partial,
            int64_t step) const {
    GramArgs p = {};
    p.a = tokens(x), p.b = tokens(y);
    p.mask = mask;
    p.batch = a.batch, p.heads = a.heads, p.tokens = a.tokens, p.parts = split.parts, p.chunk = split.chunk;
    p.partial = partial, p.step = step;
    p.squares = squares;
    launch_gram<T>(p, l.stream);
  }
  MapArgs maps(const Split& split, const float* partial, int64_t step) const {
    MapArgs p = {};
    p.options = options;
    p.temperature = temperature();
    p.batch = a.batch, p.heads = a.heads, p.parts = split.parts;
    p.dim = (int32_t)a.dim;
    p.partial = partial;
    p.step = step;
    p.stats = static_cast<float*>(a.stats);
    return p;
  }
  MixArgs<T> mix(int outputs) const {
    MixArgs<T> p = {};
    p.mask = mask;
    p.batch = a.batch, p.heads = a.heads, p.tokens = a.tokens;
    p.dim = (int32_t)a.dim;
    p.outputs = outputs;
    return p;
  }
  MixOutput<T> output(const xk_tensor& to, const xk_tensor& x, const float* map_, bool transposed) const {
    MixOutput<T> out = {};
    out.to = result<T>(to, n, a.dim);
    out.x = tokens(x);
    out.map = map_, out.transposed = transposed;
    return out;
  }
  static void add(MixOutput<T>& out, const Operand& x, const float* scale, int pieces) {
    out.add = x, out.scale = scale, out.pieces = pieces;
  }
};

template <class T>
int64_t Backend<T>::forward(const xk_xfa_args& a, const xk_cuda_launch& l, bool measure) {
  Call<T> call(a, l);
  FusedArgs<T> fused = {};
  if (!measure) fused.to[0] = result<T>(a.out, call.n, a.dim);
  if (call.template fused<false>(fused, measure)) return 0;

  Split split = call.split();
  int64_t record = call.map + 2 * a.dim;
  Workspace workspace(l.workspace);
  float *partial = workspace.take<float>(split.parts * call.heads * record),
        *map = workspace.take<float>(call.heads * call.map);
  if (measure) return workspace.used();
  call.require_two_passes({&a.q, &a.k, &a.v, &a.out});

  if (!call.key_value || call.token_norm) call.gram(a.k, a.q, call.token_norm, split, partial, record);
  if (call.key_value) call.gram(a.k, a.v, false, split, partial, record);  // in the place of k^T q

  MapArgs m = call.maps(split, partial, record);
  m.p = map;
  launch_map_forward(m, l.stream);

  MixArgs<T> y = call.mix(1);
  y.out[0] = call.output(a.out, call.key_value ? a.q : a.v, map, false);
  launch_mix(y, 0, call.device, l.stream);
  return 0;
}

template <class T>
int64_t Backend<T>::backward(const xk_xfa_args& a, const xk_cuda_launch& l, bool measure) {
  Call<T> call(a, l);
  int pieces = (int)cdiv(a.dim, kMapColumns);
  Workspace workspace(l.workspace);
  float* dtemperature = workspace.take<float>(pieces * call.heads);
  FusedArgs<T> fused = {};
  fused.dtemperature = dtemperature;
  const xk_tensor* to[3] = {&a.dq, &a.dk, &a.dv};
  if (!measure)
    for (int i = 0; i < 3; ++i) fused.to[i] = result<T>(*to[i], call.n, a.dim);
  PerHead sum = {a.dtemperature.data, a.dtemperature.stride, a.dtemperature.dtype};
  if (call.template fused<true>(fused, measure)) {
    if (!measure) launch_temperature({dtemperature, a.batch, a.heads, sum}, l.stream);
    return workspace.used();
  }

  Split split = call.split();
  float *partial = workspace.take<float>(split.parts * call.heads * call.map),
        *map_p = workspace.take<float>(call.heads * call.map), *map_q = workspace.take<float>(call.heads * call.map),
        *scale_q = workspace.take<float>(pieces * call.heads * a.dim),
        *scale_k = workspace.take<float>(pieces * call.heads * a.dim);
  if (measure) return workspace.used();
  call.require_two_passes({&a.q, &a.k, &a.v, &a.dout, &a.dq, &a.dk, &a.dv});

  call.gram(call.key_value ? a.q : a.v, a.dout, false, split, partial, call.map);

  MapArgs m = call.maps(split, partial, call.map);
  m.p = map_p, m.q = map_q, m.scale_q = scale_q, m.scale_k = scale_k, m.dtemperature = dtemperature;
  launch_map_backward(m, l.stream);

  MixArgs<T> y = call.mix(3);  // see maps.h
  y.out[0] = call.key_value ? call.output(a.dq, a.dout, map_q, true) : call.output(a.dq, a.k, map_p, false);
  y.out[1] = call.output(a.dk, call.key_value ? a.v : a.q, map_p, true);
  y.out[2] = call.key_value ? call.output(a.dv, a.k, map_p, false) : call.output(a.dv, a.dout, map_q, true);
  call.add(y.out[0], call.tokens(a.q), scale_q, call.key_value ? pieces : 1);
  call.add(y.out[1], call.tokens(a.k), scale_k, pieces);
  launch_mix(y, call.token_norm ? 2 : 0, call.device, l.stream);
  launch_temperature({dtemperature, a.batch * pieces, a.heads, sum}, l.stream);
  return workspace.used();
}

}  // namespace xk::cuda
