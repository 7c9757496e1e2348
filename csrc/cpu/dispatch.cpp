// Chooses the instruction level and forwards calls of the C API to it.
#include <stdlib.h>
#include <string.h>

#include "../include/xformer_kernels.h"

#define XK_DECLARE(level)                                             \
  namespace xk {                                                      \
  namespace level {                                                   \
  int run_gram(const xk_gram_args*);                                  \
  int run_channel_mix(const xk_channel_mix_args*);                    \
  int run_layer_gram(const xk_layer_gram_args*);                      \
  int run_layer_mix(const xk_layer_mix_args*);                        \
  int run_layer_maps(const xk_layer_maps_args*);                      \
  int run_layer_maps_backward(const xk_layer_maps_args*);             \
  int run_xfa_forward(const xk_xfa_args*);                            \
  int run_xfa_backward(const xk_xfa_args*);                           \
  int run_linear_attention_forward(const xk_linear_attention_args*);  \
  int run_linear_attention_backward(const xk_linear_attention_args*); \
  int run_linear(const xk_linear_args*);                              \
  int run_pack_linear(const xk_pack_linear_args*);                    \
  int run_depthwise(const xk_depthwise_args*);                        \
  }                                                                   \
  }
#define XK_ENTRY(level, usable)              \
  {#level,                                   \
   usable,                                   \
   xk::level::run_gram,                      \
   xk::level::run_channel_mix,               \
   xk::level::run_layer_gram,                \
   xk::level::run_layer_mix,                 \
   xk::level::run_layer_maps,                \
   xk::level::run_layer_maps_backward,       \
   xk::level::run_xfa_forward,               \
   xk::level::run_xfa_backward,              \
   xk::level::run_linear_attention_forward,  \
   xk::level::run_linear_attention_backward, \
   xk::level::run_linear,                    \
   xk::level::run_pack_linear,               \
   xk::level::run_depthwise}

#ifdef XK_HAVE_x86_64_v4
XK_DECLARE(x86_64_v4)
#endif
#ifdef XK_HAVE_zen4
XK_DECLARE(zen4)
#endif
#ifdef XK_HAVE_x86_64_v3
XK_DECLARE(x86_64_v3)
#endif
#ifdef XK_HAVE_x86_64_v2
XK_DECLARE(x86_64_v2)
#endif
#ifdef XK_HAVE_generic
XK_DECLARE(generic)
#endif

namespace {

#if defined(__x86_64__) || defined(__i386__)
[[maybe_unused]] bool has_v2() { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"); }
[[maybe_unused]] bool has_v3() {
  return has_v2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
[[maybe_unused]] bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#ifdef XK_HAVE_zen4
bool has_zen4() { return has_v4() && __builtin_cpu_supports("avx512bf16"); }
#endif
[[maybe_unused]] bool always() { return true; }

struct Level {
  const char* name;
  bool (*usable)();
  int (*gram)(const xk_gram_args*);
  int (*channel_mix)(const xk_channel_mix_args*);
  int (*layer_gram)(const xk_layer_gram_args*);
  int (*layer_mix)(const xk_layer_mix_args*);
  int (*layer_maps)(const xk_layer_maps_args*);
  int (*layer_maps_backward)(const xk_layer_maps_args*);
  int (*xfa_forward)(const xk_xfa_args*);
  int (*xfa_backward)(const xk_xfa_args*);
  int (*linear_attention_forward)(const xk_linear_attention_args*);
  int (*linear_attention_backward)(const xk_linear_attention_args*);
  int (*linear)(const xk_linear_args*);
  int (*pack_linear)(const xk_pack_linear_args*);
  int (*depthwise)(const xk_depthwise_args*);
};

// Best first.
const Level kLevels[] = {
#ifdef XK_HAVE_x86_64_v4
    XK_ENTRY(x86_64_v4, has_v4),
#endif
#ifdef XK_HAVE_zen4
    XK_ENTRY(zen4, has_zen4),
#endif
#ifdef XK_HAVE_x86_64_v3
    XK_ENTRY(x86_64_v3, has_v3),
#endif
#ifdef XK_HAVE_x86_64_v2
    XK_ENTRY(x86_64_v2, has_v2),
#endif
#ifdef XK_HAVE_generic
    XK_ENTRY(generic, always),
#endif
};

const char* asked() {
  const char* name = getenv("XFORMER_KERNELS_CPU_LEVEL");
  return name && *name ? name : nullptr;
}

const Level* choose() {
  for (const Level& level : kLevels)
    if ((!asked() || strcmp(asked(), level.name) == 0) && level.usable()) return &level;
  return nullptr;
}

const Level* level() {
  static const Level* const chosen = choose();
  return chosen;
}

// Zen 4 executes 512-bit instructions as two 256-bit operations, so half registers cost half as much there. They are
// used where whole registers would need more padding, and for bf16, which they multiply as pairs. Null on other
// processors, or if a level was requested by name.
const Level* choose_zen4() {
#ifdef XK_HAVE_zen4
  if (level() && !asked() && __builtin_cpu_is("amdfam19h") && has_zen4())
    for (const Level& zen4 : kLevels)
      if (strcmp(zen4.name, "zen4") == 0) return &zen4;
#endif
  return nullptr;
}

// The level for products with `columns` columns of a dtype. It depends on nothing else, so that results of a shape are
// always bitwise the same. pairs: whether the kernel multiplies bf16 as pairs if the level supports it.
const Level* level_for(int64_t columns, int32_t dtype, bool pairs = false) {
  static const Level* const zen4 = choose_zen4();
  const int64_t half = dtype == XK_F64 ? 4 : 8;
  return zen4 && ((pairs && dtype == XK_BF16) || (columns + half - 1) / half % 2) ? zen4 : level();
}

template <class Args>
int call(const Level* level, int (*Level::*function)(const Args*), const Args* args) {
  return level ? (level->*function)(args) : int(XK_BAD_ARGUMENT);
}

}  // namespace

extern "C" {
const char* xk_cpu_level(void) { return level() ? level()->name : ""; }
int xk_gram(const xk_gram_args* p) { return call(level_for(p->dim_b, p->b.dtype), &Level::gram, p); }
int xk_channel_mix(const xk_channel_mix_args* p) {
  return call(level_for(p->dim_out, p->y.dtype), &Level::channel_mix, p);
}
int xk_layer_gram(const xk_layer_gram_args* p) {
  return call(level_for(p->gram.dim_b, p->gram.b.dtype), &Level::layer_gram, p);
}
int xk_layer_mix(const xk_layer_mix_args* p) {
  return call(level_for(p->mix.dim_out, p->mix.y.dtype), &Level::layer_mix, p);
}
int xk_layer_maps(const xk_layer_maps_args* p) { return call(level_for(p->dim, p->dtype), &Level::layer_maps, p); }
int xk_layer_maps_backward(const xk_layer_maps_args* p) {
  return call(level_for(p->dim, p->dtype), &Level::layer_maps_backward, p);
}
int xk_xfa_forward(const xk_xfa_args* p) { return call(level_for(p->dim, p->q.dtype, true), &Level::xfa_forward, p); }
int xk_xfa_backward(const xk_xfa_args* p) { return call(level_for(p->dim, p->q.dtype, true), &Level::xfa_backward, p); }
int xk_linear_attention_forward(const xk_linear_attention_args* p) {
  return call(level_for(p->dim_v, p->q.dtype), &Level::linear_attention_forward, p);
}
int xk_linear_attention_backward(const xk_linear_attention_args* p) {
  return call(level_for(p->dim_v, p->q.dtype), &Level::linear_attention_backward, p);
}
int xk_linear(const xk_linear_args* p) { return call(level_for(p->dim_out, XK_F32), &Level::linear, p); }
int xk_pack_linear(const xk_pack_linear_args* p) { return call(level_for(p->dim_out, XK_F32), &Level::pack_linear, p); }
int xk_depthwise(const xk_depthwise_args* p) { return call(level_for(p->channels, XK_F32), &Level::depthwise, p); }
}
