// Launches of the two passes, with the kernel that fits the dtype and the number of features.
#pragma once

#include "fragment_pass.h"
#include "gram.h"
#include "launch.h"
#include "mix.h"
#include "plan.h"

namespace xk::cuda {

template <class T>
constexpr bool kShort = sizeof(T) == 2;

// Calls f with the Math (TensorCore, Tf32 or Fma) for tokens of type T.
template <class T, class F>
auto with_math(bool tf32, F f) {
  if constexpr (kShort<T>) {
    return f(TensorCore<T>{});
  } else if constexpr (sizeof(T) == 4) {
    if (tf32) return f(Tf32{});
    return f(Fma<float>{});
  } else {
    return f(Fma<double>{});
  }
}

// `exact`: tokens are converted to Sum<T>, since they are combined with numbers of that type.
template <class T, class F>
auto with_math(bool exact, bool tf32, F f) {
  if constexpr (kShort<T>)
    if (exact) return f(Fma<float>{});
  return with_math<T>(tf32, f);
}

// Common combinations of T and Math. The others have fewer kernels: for the Gram matrix, none with tiles of 32, for
// narrow heads.
template <class T, class Math>
constexpr bool kUsual = !std::is_same_v<Math, Fma<double>> && !(kShort<T> && std::is_same_v<Math, Fma<float>>);

inline Mask mask_of(const xk_mask& m) { return {m.data, m.stride_b, m.stride_n}; }

template <class T, class Math, int kTile>
void launch_gram_of(const GramArgs<Sum<T>>& p, void* stream) {
  int64_t tiles = cdiv(p.x[0].features, kTile) * cdiv(p.x[1].features, kTile);
  Arena arena(nullptr);
  GramLayout<Math, kTile>(arena, p.x[2].data ? 3 : 2);
  launch("gram", gram_kernel<T, Math, kTile>, p, p.batch * p.heads * p.parts * tiles, kGramThreads, arena.used(),
         stream);
}

template <class T>
void launch_gram(const GramArgs<Sum<T>>& p, bool tf32, void* stream) {
  if constexpr (kHasFragments<T>)
    if (fragments_fit<T>(p, tf32)) return launch_fragment_gram<T>(p, stream);
  bool narrow = p.x[0].features <= 32 && p.x[1].features <= 32;
  with_math<T>(p.norm_a || p.norm_b, tf32, [&](auto math) {
    using Math = decltype(math);
    if constexpr (kUsual<T, Math>)
      if (narrow) return launch_gram_of<T, Math, 32>(p, stream);
    launch_gram_of<T, Math, 64>(p, stream);
  });
}

// How the tokens of a Gram matrix are split over blocks. The split cannot depend on the choice of kernel, which needs
// the addresses: the size of the workspace is computed without them.
template <class T>
Split split_gram(int64_t tokens, int64_t heads, int64_t dim_a, int64_t dim_b, const Device& device) {
  int64_t record = dim_a * dim_b * (int64_t)sizeof(Sum<T>), row = dim_a * (int64_t)sizeof(T);
  if constexpr (kHasFragments<T>)
    if (dim_a == dim_b && dim_a <= kWidestFragments)
      return split_evenly(tokens, heads, record, row, (int64_t)device.processors * fragment_gram_blocks<T>(dim_a));
  int64_t tiles = dim_a <= 32 && dim_b <= 32 ? 1 : cdiv(dim_a, 64) * cdiv(dim_b, 64);
  return split_tokens(tokens, heads * tiles, record, row, device.processors, 2);
}

template <class T, class Math, int kColumns>
void launch_mix_of(MixArgs<T> p, const Device& device, void* stream) {
  using Layout = MixLayout<Math, kColumns>;
  auto bytes = [&](int resident, int stages) {
    Arena arena(nullptr);
    Layout(arena, p.operands, p.outputs, resident ? slices_of<Math, kColumns>(p) : 1, stages);
    p.resident = resident;
    p.stages = stages;
    return arena.used();
  };
  // resident maps and 2 stages if three blocks fit on a multiprocessor; else 1 stage if two fit; else no resident maps
  int64_t third = device.shared_bytes / 3, half = device.shared_bytes / 2, shared = bytes(1, 2);
  if (shared > third) shared = bytes(1, 1);
  if (shared > half) shared = bytes(0, 1);
  if (shared > device.shared_bytes) {
    if (p.outputs == 1)
      fail("mix: " + std::to_string(shared) + " bytes of shared memory are needed, the device has " +
           std::to_string(device.shared_bytes));
    for (int o = 0; o < p.outputs; ++o) {
      MixArgs<T> one = p;
      one.outputs = 1;
      one.operands = 0;
      one.out[0] = p.out[o];
      int32_t places[kOperands] = {kNone, kNone, kNone, kNone};
      auto keep = [&](int32_t& index) {
        if (index == kNone) return;
        if (places[index] == kNone) {
          places[index] = one.operands;
          one.x[one.operands++] = p.x[index];
        }
        index = places[index];
      };
      for (int t = 0; t < one.out[0].terms; ++t) keep(one.out[0].operand[t]);
      keep(one.out[0].row_norm);
      keep(one.out[0].project);
      keep(one.out[0].add);
      launch_mix_of<T, Math, kColumns>(one, device, stream);
    }
    return;
  }
  // With resident maps, a block processes more tokens, since it loads the maps only once.
  Split split = split_tokens(p.tokens, p.batch * p.heads, 0, 1, device.processors, p.resident ? 6 : 12);
  p.parts = split.parts;
  p.chunk = split.chunk;
  launch("mix", mix_kernel<T, Math, kColumns>, p, p.batch * p.heads * p.parts, kMixThreads, shared, stream);
}

template <class T>
void launch_mix(const MixArgs<T>& p, bool exact, bool tf32, const Device& device, void* stream) {
  if constexpr (kHasFragments<T>)
    if (fragments_fit(p, exact, tf32))
      return p.outputs == 1 ? launch_fragment_mix<T, 1>(p, device, stream)
                            : launch_fragment_mix<T, 3>(p, device, stream);
  int widest = 1;
  for (int x = 0; x < p.operands; ++x) widest = p.x[x].features > widest ? p.x[x].features : widest;
  for (int o = 0; o < p.outputs; ++o) widest = p.out[o].to.features > widest ? p.out[o].to.features : widest;
  with_math<T>(exact, tf32, [&](auto math) {
    using Math = decltype(math);
    if constexpr (std::is_same_v<Math, Fma<float>> && !kShort<T>)
      if (widest <= 32) return launch_mix_of<T, Math, 32>(p, device, stream);
    if (widest <= 64) return launch_mix_of<T, Math, 64>(p, device, stream);
    if constexpr (kUsual<T, Math> || sizeof(T) == 8)
      if (widest <= 128) return launch_mix_of<T, Math, 128>(p, device, stream);
    return launch_mix_of<T, Math, 256>(p, device, stream);
  });
}

}  // namespace xk::cuda
