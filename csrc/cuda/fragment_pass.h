// Which calls the kernels of fragment_gram.h and fragment_mix.h support, and their launches.
#pragma once

#include "fragment_gram.h"
#include "fragment_mix.h"
#include "launch.h"
#include "plan.h"

namespace xk::cuda {

template <class T>
constexpr bool kHasFragments = sizeof(T) != 8;
constexpr int kWidestFragments = 64;

// Calls f with the smallest kernel width that is at least `features`.
template <class F>
auto with_width(int64_t features, F f) {
  if (features <= 16) return f(std::integral_constant<int, 16>{});
  if (features <= 32) return f(std::integral_constant<int, 32>{});
  if (features <= 48) return f(std::integral_constant<int, 48>{});
  return f(std::integral_constant<int, 64>{});
}

// Whether tokens can be accessed in pieces of `bytes` bytes, and the token stride in bytes fits in 32 bits.
template <class T, class Tokens>
bool pieces_fit(const Tokens& x, int bytes) {
  return x.vector >= bytes && std::abs(x.stride_n) <= INT32_MAX / (int)sizeof(T);
}

template <class T>
int64_t fragment_gram_blocks(int64_t features) {
  return with_width(features, [](auto width) { return FragmentGram<T, width>::kBlocks; });
}

// Two different operands with the same number of contiguous features, without mask, norms and third operand. Not for
// fp32 if tf32 is allowed.
template <class T>
bool fragments_fit(const GramArgs<float>& p, bool tf32) {
  int features = p.x[0].features;
  if (p.mask.data || p.symmetric || p.norm_a || p.norm_b || p.x[2].data) return false;
  if (features != p.x[1].features || features > kWidestFragments || (sizeof(T) == 4 && tf32)) return false;
  return with_width(features, [&](auto width) {
    constexpr int kBytes = FragmentGram<T, width>::kPieceBytes;
    return pieces_fit<T>(p.x[0], kBytes) && pieces_fit<T>(p.x[1], kBytes);
  });
}

// One output of one term, or the three gradients of query_key with token norm; without mask and bias. Maps have type T
// or are converted to T.
template <class T>
bool fragments_fit(const MixArgs<T>& p, bool exact, bool tf32) {
  int features = p.x[0].features;
  if (p.mask.data || exact || features > kWidestFragments || (sizeof(T) == 4 && tf32)) return false;
  const int operands[3] = {p.outputs == 3 ? 1 : 0, 0, 2}, adds[3] = {0, 1, kNone};
  if (p.operands != p.outputs || (p.outputs != 1 && p.outputs != 3)) return false;
  if (p.outputs == 3 && features * sizeof(T) > 192) return false;  // does not fit in registers
  return with_width(features, [&](auto width) {
    constexpr int kBytes = FragmentMix<T, width, 1>::kPieceBytes;
    for (int o = 0; o < p.outputs; ++o) {
      const MixOutput<T>& out = p.out[o];
      if (out.terms != 1 || out.operand[0] != operands[o] || out.add != (p.outputs == 3 ? adds[o] : kNone))
        return false;
      if (out.row_norm != kNone || out.project != kNone || out.bias.data) return false;
      if (out.to.features != features || p.x[o].features != features) return false;
      if (!pieces_fit<T>(p.x[o], kBytes) || !pieces_fit<T>(out.to, kBytes)) return false;
    }
    return true;
  });
}

template <class T, int kOutputs>
void launch_fragment_mix(MixArgs<T> p, const Device& device, void* stream) {
  with_width(p.x[0].features, [&](auto width) {
    if constexpr (kOutputs == 1 || (int)width * sizeof(T) <= 192) {
      using Sizes = FragmentMix<T, width, kOutputs>;
      Arena arena(nullptr);
      FragmentMixLayout<T, width, kOutputs> layout(arena);
      int64_t heads = p.batch * p.heads;
      Split split = split_evenly(p.tokens, heads, 0, 1, (int64_t)device.processors * Sizes::kBlocks);
      p.parts = split.parts;
      p.chunk = split.chunk;
      launch(kOutputs == 1 ? "fragment_mix" : "fragment_gradients", fragment_mix_kernel<T, width, kOutputs>, p,
             heads * p.parts, Sizes::kThreads, arena.used(), stream);
    }
  });
}

template <class T>
void launch_fragment_gram(const GramArgs<float>& p, void* stream) {
  with_width(p.x[0].features, [&](auto width) {
    using Sizes = FragmentGram<T, width>;
    Arena arena(nullptr);
    FragmentGramLayout<T, width> layout(arena);
    launch("fragment_gram", fragment_gram_kernel<T, width>, p, p.batch * p.heads * p.parts, Sizes::kThreads,
           arena.used(), stream);
  });
}

}  // namespace xk::cuda
