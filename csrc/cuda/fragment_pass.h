// Launches of the kernels of fragment_gram.h and fragment_mix.h, with the width that fits the number of features.
#pragma once

#include "fragment_gram.h"
#include "fragment_mix.h"
#include "launch.h"
#include "plan.h"

namespace xk::cuda {

// Calls f with the smallest kernel width that is at least `features`.
template <class F>
auto with_width(int64_t features, F f) {
  if (features <= 16) return f(std::integral_constant<int, 16>{});
  if (features <= 32) return f(std::integral_constant<int, 32>{});
  if (features <= 48) return f(std::integral_constant<int, 48>{});
  return f(std::integral_constant<int, 64>{});
}

template <class T>
Split split_gram(int64_t tokens, int64_t heads, int64_t dim, const Device& device) {
  int64_t blocks = with_width(dim, [](auto width) { return FragmentGram<T, width>::kBlocks; });
  int64_t record = dim * dim * (int64_t)sizeof(float), row = dim * (int64_t)sizeof(T);
  return split_evenly(tokens, heads, record, row, device.processors * blocks);
}

template <class T>
void launch_gram(const GramArgs& p, void* stream) {
  with_width(p.a.features, [&](auto width) {
    using Sizes = FragmentGram<T, width>;
    Arena arena(nullptr);
    FragmentGramLayout<T, width> layout(arena);
    launch("fragment_gram", fragment_gram_kernel<T, width>, p, p.batch * p.heads * p.parts, Sizes::kThreads,
           arena.used(), stream);
  });
}

template <class T, int kDim, int kOutputs, int kAdds>
void launch_mix_of(MixArgs<T> p, const Device& device, void* stream) {
  using Sizes = FragmentMix<T, kDim, kOutputs, kAdds>;
  Arena arena(nullptr);
  FragmentMixLayout<T, kDim, kOutputs, kAdds> layout(arena);
  int64_t heads = p.batch * p.heads;
  Split split = split_evenly(p.tokens, heads, 0, 1, (int64_t)device.processors * Sizes::kBlocks);
  p.parts = split.parts, p.chunk = split.chunk;
  launch(kOutputs == 1 ? "fragment_mix" : "fragment_gradients", fragment_mix_kernel<T, kDim, kOutputs, kAdds>, p,
         heads * p.parts, Sizes::kThreads, arena.used(), stream);
}

// The results of p. The first `adds` of them have a term `scale * add`: none, or two of three.
template <class T>
void launch_mix(const MixArgs<T>& p, int adds, const Device& device, void* stream) {
  with_width(p.dim, [&](auto width) {
    constexpr bool kTogether = width * sizeof(T) <= 192;  // three results fit in registers
    if constexpr (kTogether)
      if (adds == 2) return launch_mix_of<T, width, 3, 2>(p, device, stream);
    MixArgs<T> one = p;
    for (int o = 0; o < p.outputs; ++o) {
      one.out[0] = p.out[o];
      if constexpr (!kTogether)
        if (o < adds) {
          launch_mix_of<T, width, 1, 1>(one, device, stream);
          continue;
        }
      launch_mix_of<T, width, 1, 0>(one, device, stream);
    }
  });
  if (p.mask.data) {
    int64_t blocks = cdiv(p.batch * p.tokens, kClearThreads / 32), most = 8 * device.processors;
    launch("clear", clear_kernel<T>, p, blocks < most ? blocks : most, kClearThreads, 0, stream);
  }
}

}  // namespace xk::cuda
