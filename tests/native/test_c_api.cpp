// Compares the C API with plain loops in double, at the instruction level named by XFORMER_KERNELS_CPU_LEVEL, or the
// one that the library chooses. Prints failures and exits with 1 if there are any, or with 77 if the level is not
// usable on this processor. Needs neither Python nor torch.
#include <stdlib.h>

#include "naive.h"

namespace {

Judge judge;
const double kEps = 1e-6;

struct Shape {
  int64_t B, H, N, D;
};
const Shape kShapes[] = {{1, 1, 1, 1},   {1, 2, 7, 3},   {2, 3, 17, 5},  {1, 2, 40, 8},   {1, 1, 53, 13},
                         {2, 1, 29, 16}, {1, 1, 31, 31}, {1, 2, 37, 48}, {1, 1, 45, 67},  {1, 1, 2051, 4},
                         {1, 0, 5, 3},   {1, 1, 0, 3},   {1, 1, 3, 130}, {1, 1, 2100, 12}};
const int kThreads = 2;

std::string name(const char* what, const Shape& s, int dtype, Layout layout, bool masked) {
  const char* layouts[] = {"packed", "padded", "channel-major", "strided"};
  return describe("%s (%d,%d,%d,%d) %s %s%s", what, int(s.B), int(s.H), int(s.N), int(s.D), type(dtype).name,
                  layouts[layout], masked ? " masked" : "");
}

void gram(const Shape& s, int dtype, Layout layout, bool masked) {
  for (bool symmetric : {false, true}) {
    const int64_t Db = symmetric ? s.D : s.D + 2;
    Tensor a = Tensor(s.B, s.H, s.N, s.D, dtype, layout).randomise(), b = a;
    if (!symmetric) b = Tensor(s.B, s.H, s.N, Db, dtype).randomise();
    Mask mask(masked, s.B, s.N);
    const int wide = accumulated(dtype);
    Tensor g(s.B, s.H, s.D, Db, wide, kHeadsFirst), ssq_a(s.B, s.H, 1, s.D, wide), ssq_b(s.B, s.H, 1, Db, wide);
    xk_gram_args p = {};
    p.batch = s.B, p.heads = s.H, p.tokens = s.N, p.dim_a = s.D, p.dim_b = Db;
    p.a = a.c(), p.b = b.c(), p.symmetric = symmetric, p.mask = mask.c(), p.threads = kThreads;
    p.g = g.bytes.data(), p.ssq_a = ssq_a.bytes.data(), p.ssq_b = ssq_b.bytes.data();
    const std::string what = name(symmetric ? "symmetric gram" : "gram", s, dtype, layout, masked);
    judge.status(xk_gram(&p), XK_OK, what);
    const Array x = mask.applied(a.values()), y = mask.applied(b.values());
    judge.near(g, gram_of(x, y), what + " g", dtype);
    judge.near(ssq_a, sums_of(x, 2), what + " ssq_a", dtype);
    judge.near(ssq_b, sums_of(y, 2), what + " ssq_b", dtype);

    Tensor center = Tensor(s.B, s.H, 1, Db, wide).randomise();
    xk_layer_gram_args layer = {};
    Tensor lg(s.B, s.H, s.D, Db, wide, kHeadsFirst), sum_a(s.B, s.H, 1, s.D, wide), sum_b(s.B, s.H, 1, Db, wide);
    layer.gram = p, layer.gram.g = lg.bytes.data(), layer.gram.ssq_a = layer.gram.ssq_b = nullptr;
    layer.prologue = {1, 1e-3, center.bytes.data()};
    layer.sum_a = sum_a.bytes.data(), layer.sum_b = sum_b.bytes.data();
    judge.status(xk_layer_gram(&layer), XK_OK, "layer " + what);
    Array u = layer_norm(b.values(), 1e-3);
    const Array less = center.values();
    heads(u, [&](auto B, auto H) { pairs_of(u.N, u.D, [&](auto n, auto d) { u(B, H, n, d) -= less(B, H, 0, d); }); });
    u = mask.applied(u);
    judge.near(lg, gram_of(symmetric ? u : x, u), "layer " + what + " g", dtype, s.N / 4.);
    judge.near(sum_a, sums_of(symmetric ? u : x, 1), "layer " + what + " sum_a", dtype, s.N / 4.);
    judge.near(sum_b, sums_of(u, 1), "layer " + what + " sum_b", dtype, s.N / 4.);
  }
}

void channel_mix(const Shape& s, int dtype, Layout layout, bool everything) {
  const int64_t O = everything ? s.D + 3 : s.D, I2 = everything ? O : 0;
  Tensor x = Tensor(s.B, s.H, s.N, s.D, dtype, layout).randomise(), x2 = Tensor(s.B, s.H, s.N, I2, dtype).randomise();
  Tensor w = Tensor(s.B, s.H, O, s.D, XK_F32).randomise(), w2 = Tensor(s.B, s.H, O, I2, dtype).randomise();
  Tensor bias = Tensor(s.B, s.H, 1, O, dtype).randomise(), scale = Tensor(s.B, s.H, 1, O, dtype).randomise();
  Tensor add = Tensor(s.B, s.H, s.N, O, dtype, layout).randomise();
  xk_channel_mix_args p = {};
  p.batch = s.B, p.heads = s.H, p.tokens = s.N, p.dim_in = s.D, p.dim_in2 = I2, p.dim_out = O;
  p.x = x.c(), p.weight = w.c(), p.threads = kThreads;
  if (everything) p.bias = bias.c(), p.scale = scale.c(), p.add = add.c(), p.x2 = x2.c(), p.weight2 = w2.c();
  // y must have unit stride over tokens or over features
  const Layout to = layout == kStrided ? kPadded : layout;
  Tensor y(s.B, s.H, s.N, O, dtype, to);
  p.y = y.c();
  const std::string what = name(everything ? "channel_mix of everything" : "channel_mix", s, dtype, layout, false);
  judge.status(xk_channel_mix(&p), XK_OK, what);
  auto expected = [&](const Array& first, const Array& second, double scaled) {
    Array z = product(first, transposed(w.values()));
    if (!everything) return z;
    z = plus(z, product(second, transposed(w2.values())));
    const Array plain = add.values(), c = bias.values(), by = scale.values();
    heads(z, [&](auto B, auto H) {
      pairs_of(z.N, z.D,
               [&](auto n, auto o) { z(B, H, n, o) += c(B, H, 0, o) + scaled * by(B, H, 0, o) * plain(B, H, n, o); });
    });
    return z;
  };
  judge.near(y, expected(x.values(), x2.values(), 1), what, dtype);

  xk_layer_mix_args layer = {};
  layer.prologue = {1, 1e-3, nullptr};
  Tensor ly(s.B, s.H, s.N, O, dtype, to), gradient = ly;
  layer.mix = p, layer.mix.y = ly.c();
  judge.status(xk_layer_mix(&layer), XK_OK, "layer " + what);
  const Array u = layer_norm(everything ? x2.values() : x.values(), 1e-3);
  const Array mixed = everything ? expected(x.values(), u, 1) : expected(u, u, 1);
  judge.near(ly, mixed, "layer " + what, dtype, 4);

  layer.differentiate = 1, layer.mix.y = gradient.c(), layer.mix.scale.data = nullptr;
  judge.status(xk_layer_mix(&layer), XK_OK, "differentiated layer " + what);
  const Array g = everything ? expected(x.values(), u, 0) : expected(u, u, 0);
  Array dx = layer_norm_backward(everything ? x2.values() : x.values(), g, 1e-3);
  if (everything) dx = plus(dx, add.values());
  judge.near(gradient, dx, "differentiated layer " + what, dtype, s.D < 4 ? 1000 : 100);  // 1 / a small spread
}

void xfa(const Shape& s, int dtype, Layout layout, bool masked, int map, int norm, int activation) {
  auto tensor = [&] { return Tensor(s.B, s.H, s.N, s.D, dtype, layout).randomise(); };
  const Layout to = layout == kStrided ? kPadded : layout;
  Tensor q = tensor(), k = tensor(), v = tensor(), dout = tensor(), t = Tensor(1, 1, 1, s.H, XK_F32).randomise();
  Tensor out(s.B, s.H, s.N, s.D, dtype, to), dq = out, dk = out, dv = out, dt(1, 1, 1, s.H, XK_F32);
  Tensor stats(s.B, s.H, s.D + 2, s.D, accumulated(dtype));
  Mask mask(masked, s.B, s.N);
  xk_xfa_args p = {};
  p.batch = s.B, p.heads = s.H, p.tokens = s.N, p.dim = s.D, p.map = map, p.norm = norm, p.activation = activation;
  p.eps = kEps, p.q = q.c(), p.k = k.c(), p.v = v.c(), p.dout = dout.c(), p.mask = mask.c(), p.threads = kThreads;
  p.out = out.c(), p.dq = dq.c(), p.dk = dk.c(), p.dv = dv.c(), p.stats = stats.bytes.data();
  p.temperature = t.per_head(), p.dtemperature = dt.per_head();
  const char *maps[] = {"query_key", "key_value"}, *norms[] = {"token", "feature", "none"};
  const std::string what = name("xfa", s, dtype, layout, masked) + " " + maps[map] + " " + norms[norm] +
                           (activation == XK_SOFTMAX ? " softmax" : " identity");
  judge.status(xk_xfa_forward(&p), XK_OK, what);
  judge.status(xk_xfa_backward(&p), XK_OK, what + " backward");
  auto part = [&](Tensor& x) { return mask.applied(x.values()); };
  const Attention r = xfa(part(q), part(k), part(v), t.values(), part(dout), map, norm, activation == XK_SOFTMAX, kEps);
  // except with token norm, maps are sums over tokens; with few features, gradients of norms cancel
  const double size = norm == XK_TOKEN_NORM ? 1 : std::max(std::sqrt(s.N), 1.), gradient = size * (s.D < 4 ? 100 : 4);
  judge.near(out, mask.applied(r.out), what + " out", dtype, size);
  judge.near(dq, mask.applied(r.dq), what + " dq", dtype, gradient);
  judge.near(dk, mask.applied(r.dk), what + " dk", dtype, gradient);
  judge.near(dv, mask.applied(r.dv), what + " dv", dtype, gradient);
  judge.near(dt, r.dt, what + " dtemperature", dtype, gradient * size);  // of products of such sums
}

// The maps of a layer, compared with xfa of q, k and v projected from tokens u, which are centred at c.
void layer_maps(const Shape& s, int dtype, int map, bool normalised, int activation) {
  const int64_t C = s.D + 3, rows = map == XK_KEY_VALUE ? 3 : 2, mixed = map == XK_KEY_VALUE ? 0 : 2;
  auto tensor = [&](int64_t B, int64_t H, int64_t N, int64_t D) { return Tensor(B, H, N, D, dtype, kHeadsFirst); };
  Tensor w = tensor(3, s.H, s.D, C).randomise(), bias = tensor(3, s.H, 1, s.D).randomise();
  Tensor t = tensor(1, 1, 1, s.H).randomise(), c = tensor(s.B, 1, 1, C).randomise();
  Tensor u = tensor(s.B, 1, s.N, C).randomise(), dout = tensor(s.B, s.H, s.N, s.D).randomise();
  const Array W = w.values(), b = bias.values(), tokens = u.values(), center = c.values(), g = dout.values();
  Array parts[3];
  for (int i = 0; i < 3; ++i) {
    parts[i] = Array(s.B, s.H, s.N, s.D);
    heads(parts[i], [&](auto B, auto H) {
      pairs_of(s.N, s.D, [&](auto n, auto d) {
        parts[i](B, H, n, d) = b(i, H, 0, d);
        for (int64_t k = 0; k < C; ++k)
          parts[i](B, H, n, d) += W(i, H, d, k) * (tokens(B, 0, n, k) + center(B, 0, 0, k));
      });
    });
  }
  const int norm = normalised ? XK_TOKEN_NORM : XK_NO_NORM;
  const Attention r = xfa(parts[0], parts[1], parts[2], t.values(), g, map, norm, activation == XK_SOFTMAX, kEps);

  const Array S = gram_of(tokens, tokens), sums = sums_of(tokens, 1);
  Array over_heads(s.B, s.H, s.N, C);  // u for each head
  over_heads.data.clear();
  for (int64_t B = 0; B < s.B; ++B)
    for (int64_t H = 0; H < s.H; ++H)
      over_heads.data.insert(over_heads.data.end(), tokens.data.begin() + B * s.N * C,
                             tokens.data.begin() + (B + 1) * s.N * C);
  Tensor n = tensor(s.B, 1, 1, 1), sum = tensor(s.B, 1, 1, C), P = tensor(s.B, rows * s.H, s.D, C);
  Tensor dT = tensor(s.B, s.H, s.D, C), de = tensor(s.B, s.H, 1, s.D);
  auto fill = [](Tensor& to, auto f) { to.each([&](auto... i) { encode(to.at(i...), to.dtype, f(i...)); }); };
  const Array dT_exact = gram_of(g, over_heads), de_exact = sums_of(g, 1);
  fill(n, [&](auto...) { return double(s.N); });
  fill(sum, [&](auto B, auto, auto, auto k) { return sums(B, 0, 0, k); });
  fill(P, [&](auto B, auto row, auto d, auto k) {
    double x = 0;
    for (int64_t j = 0; j < C; ++j) x += W(row / s.H, row % s.H, d, j) * S(B, 0, j, k);
    return x;
  });
  fill(dT, [&](auto... i) { return dT_exact(i...); });
  fill(de, [&](auto... i) { return de_exact(i...); });

  Tensor T = tensor(s.B, s.H, s.D, C), e = tensor(s.B, s.H, 1, s.D), cos = tensor(s.B, s.H, s.D, s.D);
  Tensor norms = tensor(s.B, 2 * s.H, 1, s.D), X = tensor(s.B, rows * s.H, s.D, C), x = tensor(s.B, rows * s.H, 1, s.D);
  Tensor dz = tensor(s.B, s.H, s.D, C), shifted = tensor(s.B, 3 * s.H, 1, s.D), dt(s.B, 1, 1, s.H, XK_F64, kHeadsFirst);
  xk_layer_maps_args p = {};
  p.batch = s.B, p.heads = s.H, p.dim = s.D, p.features = C, p.dtype = dtype, p.map = map, p.activation = activation;
  p.normalised = normalised, p.eps = kEps, p.threads = kThreads;
  p.qkv = w.bytes.data(), p.qkv_bias = bias.bytes.data(), p.temperature = t.bytes.data(), p.s = sum.bytes.data();
  p.n = n.bytes.data(), p.c = c.bytes.data(), p.P = P.bytes.data(), p.dT = dT.bytes.data(), p.de = de.bytes.data();
  p.T = T.bytes.data(), p.e = e.bytes.data(), p.cos = cos.bytes.data(), p.norms = norms.bytes.data();
  const std::string what = name("layer_maps", s, dtype, kPacked, false) + (map ? " key_value" : " query_key") +
                           (normalised ? "" : " not normalised") + (activation ? " identity" : " softmax");
  judge.status(xk_layer_maps(&p), XK_OK, what);
  // T u + e is the output of xfa
  const Array mix = T.values(), plus_e = e.values();
  Tensor out = tensor(s.B, s.H, s.N, s.D);
  fill(out, [&](auto B, auto H, auto row, auto d) {
    double y = plus_e(B, H, 0, d);
    for (int64_t k = 0; k < C; ++k) y += mix(B, H, d, k) * tokens(B, 0, row, k);
    return y;
  });
  const double size = normalised ? 1 : std::max(double(s.N), 1.), gradient = size * std::max(double(s.N), 1.) * 40;
  judge.near(out, r.out, what, dtype, size * C * 4);

  p.X = X.bytes.data(), p.x = x.bytes.data(), p.dz = dz.bytes.data(), p.dshifted = shifted.bytes.data();
  p.dtemperature = (double*)dt.bytes.data();
  judge.status(xk_layer_maps_backward(&p), XK_OK, what + " backward");
  const Array of_X = X.values(), of_x = x.values(), of_z = dz.values();
  const Array* gradients[] = {&r.dq, &r.dk, &r.dv};
  for (int i = 0; i < 3; ++i) {
    Tensor of_weight = tensor(s.B, s.H, s.D, C), of_shift = tensor(s.B, s.H, 1, s.D);
    fill(of_weight, [&](auto B, auto H, auto d, auto k) {
      double y = i == mixed ? of_z(B, H, d, k) : 0;
      for (int64_t j = 0; i < rows && j < C; ++j) y += of_X(B, i * s.H + H, d, j) * S(B, 0, j, k);
      return i < rows ? y + of_x(B, i * s.H + H, 0, d) * sums(B, 0, 0, k) : y;
    });
    const Array all = shifted.values();
    fill(of_shift, [&](auto B, auto H, auto, auto d) { return all(B, i * s.H + H, 0, d); });
    const std::string which = what + describe(" gradient %d", i);
    judge.near(of_weight, gram_of(*gradients[i], over_heads), which + " of weights", dtype, gradient * C);
    judge.near(of_shift, sums_of(*gradients[i], 1), which + " of shifts", dtype, gradient * C);
  }
  Tensor total = tensor(1, 1, 1, s.H);
  const Array of_t = dt.values();
  fill(total, [&](auto, auto, auto, auto H) {
    double y = 0;
    for (int64_t B = 0; B < s.B; ++B) y += of_t(B, 0, 0, H);
    return y;
  });
  judge.near(total, r.dt, what + " dtemperature", dtype, gradient * size * C);
}

void linear_attention(const Shape& s, int dtype, Layout layout, bool masked, int features_q, int features_k) {
  const int64_t M = s.N + 5, E = s.D + 2;
  const Layout to = layout == kStrided ? kPadded : layout;
  Tensor q = Tensor(s.B, s.H, s.N, s.D, dtype, layout).randomise(), k = Tensor(s.B, s.H, M, s.D, dtype).randomise();
  Tensor v = Tensor(s.B, s.H, M, E, dtype, layout).randomise(), dout = Tensor(s.B, s.H, s.N, E, dtype).randomise();
  Tensor out(s.B, s.H, s.N, E, dtype, to), dq(s.B, s.H, s.N, s.D, dtype, to), dk(s.B, s.H, M, s.D, dtype, to);
  Tensor dv(s.B, s.H, M, E, dtype, to), stats(s.B, s.H, s.D + 2, E, accumulated(dtype));
  Mask queries(masked, s.B, s.N), tokens(masked, s.B, M);
  xk_linear_attention_args p = {};
  p.batch = s.B, p.heads = s.H, p.queries = s.N, p.tokens = M, p.dim = s.D, p.dim_v = E, p.threads = kThreads;
  p.features_q = features_q, p.features_k = features_k, p.normalize = features_k != XK_IDENTITY_FEATURES;
  p.scale = 0.7, p.eps = 0.5;  // with relu, denominators may be 0 without eps
  p.q = q.c(), p.k = k.c(), p.v = v.c(), p.out = out.c(), p.dout = dout.c(), p.dq = dq.c(), p.dk = dk.c();
  p.dv = dv.c(), p.query_mask = queries.c(), p.token_mask = tokens.c(), p.stats = stats.bytes.data();
  const std::string what =
      name("linear_attention", s, dtype, layout, masked) + describe(" %d/%d", features_q, features_k);
  judge.status(xk_linear_attention_forward(&p), XK_OK, what);
  judge.status(xk_linear_attention_backward(&p), XK_OK, what + " backward");
  const Attention r = linear_attention(q.values(), k.values(), v.values(), dout.values(), features_q, features_k,
                                       p.normalize, p.scale, p.eps, queries, tokens);
  const double size = p.normalize ? 4 : double(M);
  judge.near(out, r.out, what + " out", dtype, size);
  judge.near(dq, r.dq, what + " dq", dtype, size);
  judge.near(dk, r.dk, what + " dk", dtype, size);
  judge.near(dv, r.dv, what + " dv", dtype, size);
}

// One row of floats for parameters; positive: for variances.
struct Parameters {
  Tensor stored;
  Array values;
  explicit Parameters(int64_t size, bool positive = false) : stored(1, 1, 1, size, XK_F32) {
    stored.randomise();
    if (positive)
      stored.each([&](auto... i) { encode(stored.at(i...), XK_F32, decode(stored.at(i...), XK_F32) + 1.5); });
    values = stored.values();
  }
  const float* c() const { return (const float*)stored.bytes.data(); }
  double operator[](int64_t i) const { return values(0, 0, 0, i); }
};
struct BatchNorm {
  Parameters mean, variance, weight, bias;
  explicit BatchNorm(int64_t size) : mean(size), variance(size, true), weight(size), bias(size) {}
  xk_batch_norm c() const { return {mean.c(), variance.c(), weight.c(), bias.c(), 1e-3}; }
  double operator()(double z, int64_t c) const {
    return weight[c] * (z - mean[c]) / std::sqrt(variance[c] + 1e-3) + bias[c];
  }
};
double hard_swish(double x) { return x * std::min(std::max(x + 3, 0.), 6.) / 6; }

void linear(int64_t N, int64_t I, int64_t O, bool everything) {
  Tensor x = Tensor(1, 1, N, I, XK_F32).randomise(), w = Tensor(1, 1, O, I, XK_F32).randomise();
  Tensor add = Tensor(1, 1, N, O, XK_F32).randomise(), y(1, 1, N, O, XK_F32);
  Parameters ln_weight(I), ln_bias(I), bias(O);
  BatchNorm norm(O);
  xk_linear_args p = {};
  p.tokens = N, p.dim_in = I, p.dim_out = O, p.threads = kThreads, p.x = (float*)x.bytes.data();
  p.weight = (float*)w.bytes.data(), p.y = (float*)y.bytes.data(), p.bias = bias.c();
  if (everything) {
    p.layer_norm = 1, p.layer_norm_weight = ln_weight.c(), p.layer_norm_bias = ln_bias.c(), p.layer_norm_eps = 1e-3;
    p.norm = norm.c(), p.hard_swish = 1, p.add = (float*)add.bytes.data();
  }
  const std::string what = describe("linear (%d,%d,%d)%s", int(N), int(I), int(O), everything ? " of everything" : "");
  judge.status(xk_linear(&p), XK_OK, what);
  Array u = x.values();
  const Array plain = add.values();
  if (everything) {
    u = layer_norm(u, 1e-3);
    pairs_of(N, I, [&](auto n, auto i) { u(0, 0, n, i) = u(0, 0, n, i) * ln_weight[i] + ln_bias[i]; });
  }
  Array z = product(u, transposed(w.values()));
  pairs_of(N, O, [&](auto n, auto o) {
    double& at = z(0, 0, n, o);
    at += bias[o];
    if (everything) at = hard_swish(norm(at, o)) + plain(0, 0, n, o);
  });
  judge.near(y, z, what, XK_F32, 4);

  Tensor packed(1, 1, I, (O + 15) / 16 * 16, XK_F32);
  const xk_pack_linear_args pack = {I, O, p.weight, (float*)packed.bytes.data()};
  judge.status(xk_pack_linear(&pack), XK_OK, what + " packing");
  p.packed = pack.packed;
  if (everything) {
    judge.status(xk_linear(&p), XK_BAD_ARGUMENT, what + " packed, with batch norm");
    return;
  }
  Tensor from_packed(1, 1, N, O, XK_F32);
  p.weight = nullptr, p.y = (float*)from_packed.bytes.data();
  judge.status(xk_linear(&p), XK_OK, what + " packed");
  judge.near(from_packed, z, what + " packed", XK_F32, 4);
}

void depthwise(int64_t height, int64_t width, int64_t channels, int kernel, int stride, bool everything) {
  const int64_t h = (height + stride - 1) / stride, w = (width + stride - 1) / stride;
  Tensor x = Tensor(2, height, width, channels, XK_F32), y(2, h, w, channels, XK_F32);
  x.sh = width * channels, x.sn = channels, x.sb = height * x.sh;  // image rows and columns as heads and tokens
  y.sh = w * channels, y.sn = channels, y.sb = h * y.sh;
  x.randomise();
  Parameters weight(channels * kernel * kernel), bias(channels);
  BatchNorm norm(channels);
  xk_depthwise_args p = {};
  p.batch = 2, p.height = height, p.width = width, p.channels = channels, p.kernel = kernel, p.stride = stride;
  p.x = (float*)x.bytes.data(), p.weight = weight.c(), p.bias = bias.c(), p.y = (float*)y.bytes.data();
  p.threads = kThreads;
  if (everything) p.norm = norm.c(), p.hard_swish = 1;
  const std::string what = describe("depthwise (%d,%d,%d) kernel %d stride %d%s", int(height), int(width),
                                    int(channels), kernel, stride, everything ? " of everything" : "");
  judge.status(xk_depthwise(&p), XK_OK, what);
  const Array in = x.values();
  Array z(2, h, w, channels);
  y.each([&](auto b, auto i, auto j, auto c) {
    double sum = bias[c];
    pairs_of(kernel, kernel, [&](auto u, auto v) {
      const int64_t row = stride * i + u - kernel / 2, column = stride * j + v - kernel / 2;
      if (row >= 0 && row < height && column >= 0 && column < width)
        sum += weight[(c * kernel + u) * kernel + v] * in(b, row, column, c);
    });
    z(b, i, j, c) = everything ? hard_swish(norm(sum, c)) : sum;
  });
  judge.near(y, z, what, XK_F32);
}

void attention(const Shape& s, int dtype, Layout layout, bool masked) {
  for (int norm : {XK_TOKEN_NORM, XK_FEATURE_NORM, XK_NO_NORM}) {
    xfa(s, dtype, layout, masked, XK_KEY_VALUE, norm, XK_IDENTITY);
    xfa(s, dtype, layout, masked, XK_QUERY_KEY, norm, XK_IDENTITY);
    // without norms, a softmax of sums over many tokens is one-hot, and its derivative consists of rounding errors
    if (norm != XK_NO_NORM || s.N < 50) xfa(s, dtype, layout, masked, XK_QUERY_KEY, norm, XK_SOFTMAX);
  }
  for (int map : {XK_IDENTITY_FEATURES, XK_RELU, XK_ELU_PLUS_1, XK_SOFTMAX_FEATURES})
    linear_attention(s, dtype, layout, masked, map, map);
  linear_attention(s, dtype, layout, masked, XK_SOFTMAX_FEATURES, XK_SOFTMAX_TOKENS);
}

}  // namespace

int main() {
  const char* asked = getenv("XFORMER_KERNELS_CPU_LEVEL");
  const std::string level = xk_cpu_level();
  if (level.empty()) {
    printf("not run: %s was not built, or this processor does not have it\n", asked ? asked : "the level");
    return 77;
  }
  judge.pairs = level == "zen4";
  int turn = 0;
  for (const Shape& s : kShapes)
    for (int dtype : {XK_F32, XK_F64, XK_BF16, XK_F16}) {
      // all layouts occur for each shape, in some dtype, with and without a mask
      const Layout layout = Layout(turn / 2 % kLayouts);
      const bool masked = turn++ % 2;
      gram(s, dtype, layout, masked);
      channel_mix(s, dtype, layout, masked);
      attention(s, dtype, layout, masked);
      if (accumulated(dtype) != dtype) continue;
      for (bool normalised : {true, false}) {
        layer_maps(s, dtype, XK_KEY_VALUE, normalised, XK_IDENTITY);
        layer_maps(s, dtype, XK_QUERY_KEY, normalised, XK_IDENTITY);
        if (normalised || s.N < 50) layer_maps(s, dtype, XK_QUERY_KEY, normalised, XK_SOFTMAX);
      }
    }
  const int64_t sizes[][3] = {{1, 1, 1}, {7, 5, 3}, {50, 16, 48}, {100, 67, 131}, {3, 600, 40}, {2, 48, 1000}};
  for (auto [tokens, in, out] : sizes) linear(tokens, in, out, false), linear(tokens, in, out, true);
  for (int kernel : {3, 5})
    for (int stride : {1, 2})
      for (int64_t channels : {1, 7, 33, 40}) depthwise(13, 21, channels, kernel, stride, channels % 2 == 0);
  xk_gram_args nothing = {};
  judge.status(xk_gram(&nothing), XK_BAD_ARGUMENT, "gram without features");
  xk_layer_maps_args halves = {};
  halves.dim = halves.features = 1, halves.dtype = XK_BF16;
  judge.status(xk_layer_maps(&halves), XK_BAD_ARGUMENT, "layer_maps of bf16");
  printf("%s: %d elements compared, largest error %.2f of its tolerance, %d failures\n", level.c_str(), judge.compared,
         judge.worst, judge.failures);
  return judge.failures > 0;
}
