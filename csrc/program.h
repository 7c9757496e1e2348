// A sequence of kernel calls whose arguments are fixed in advance, except for the addresses of three memory blocks
// (input, output, workspace) that hold their tensors.
#pragma once

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"

// Index of a memory block, and offset in it in floats. Index -1 stands for no tensor.
typedef std::pair<int, int64_t> Place;

class Program {
 public:
  // See xk_linear_args; without batch norm, and with the weight packed.
  void linear(int64_t tokens, int64_t dim_in, int64_t dim_out, const Place& x, uintptr_t layer_norm_weight,
              uintptr_t layer_norm_bias, std::optional<double> layer_norm_eps, uintptr_t packed, uintptr_t bias,
              bool hard_swish, const Place& add, const Place& y) {
    xk_linear_args args = {};
    args.tokens = tokens, args.dim_in = dim_in, args.dim_out = dim_out;
    args.layer_norm = layer_norm_eps.has_value(), args.layer_norm_eps = layer_norm_eps.value_or(0);
    args.layer_norm_weight = floats(layer_norm_weight), args.layer_norm_bias = floats(layer_norm_bias);
    args.packed = floats(packed), args.bias = floats(bias), args.hard_swish = hard_swish;
    steps.push_back([=](const Blocks& blocks, int threads) {
      xk_linear_args p = args;
      p.x = at(blocks, x), p.add = at(blocks, add), p.y = at(blocks, y), p.threads = threads;
      return xk_linear(&p);
    });
  }

  // See xk_depthwise_args; without batch norm.
  void depthwise(int64_t batch, int64_t height, int64_t width, int64_t channels, int kernel, int stride, const Place& x,
                 uintptr_t weight, uintptr_t bias, bool hard_swish, const Place& y) {
    xk_depthwise_args args = {};
    args.batch = batch, args.height = height, args.width = width, args.channels = channels;
    args.kernel = kernel, args.stride = stride, args.hard_swish = hard_swish;
    args.weight = floats(weight), args.bias = floats(bias);
    steps.push_back([=](const Blocks& blocks, int threads) {
      xk_depthwise_args p = args;
      p.x = at(blocks, x), p.y = at(blocks, y), p.threads = threads;
      return xk_depthwise(&p);
    });
  }

  // From packed qkv (batch, tokens, 3, heads, dim) to out (batch, tokens, heads, dim).
  void xfa(int64_t batch, int64_t tokens, int64_t heads, int64_t dim, int map, int norm, int activation, double eps,
           uintptr_t temperature, const Place& qkv, const Place& stats, const Place& out) {
    const int64_t width = heads * dim;
    const Strides sizes = {batch, heads, tokens, dim}, of_qkv = {3 * width * tokens, dim, 3 * width, 1};
    const Strides of_out = {width * tokens, dim, width, 1};
    steps.push_back([=](const Blocks& blocks, int threads) {
      auto part = [&](int i) { return reinterpret_cast<uintptr_t>(at(blocks, qkv) + i * width); };
      xk_xfa_args p =
          xfa_forward_args(sizes, XK_F32, map, norm, activation, eps, part(0), of_qkv, part(1), of_qkv, part(2), of_qkv,
                           temperature, 1, XK_F32, 0, 0, 0, reinterpret_cast<uintptr_t>(at(blocks, stats)),
                           reinterpret_cast<uintptr_t>(at(blocks, out)), of_out);
      p.threads = threads;
      return xk_xfa_forward(&p);
    });
  }

  int run(const std::vector<uintptr_t>& blocks, int threads) const {
    for (const auto& step : steps)
      if (int status = step(blocks, threads)) return status;
    return XK_OK;
  }

 private:
  typedef std::vector<uintptr_t> Blocks;

  static const float* floats(uintptr_t data) { return reinterpret_cast<const float*>(data); }
  static float* at(const Blocks& blocks, const Place& place) {
    return place.first < 0 ? nullptr : reinterpret_cast<float*>(blocks.at(place.first)) + place.second;
  }

  std::vector<std::function<int(const Blocks&, int)>> steps;
};
