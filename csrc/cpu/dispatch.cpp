// Chooses the instruction level once and forwards the C API to it.
#include <stdlib.h>
#include <string.h>

#include "../include/xformer_kernels.h"

#define XK_DECLARE(level)                          \
  namespace xk {                                   \
  namespace level {                                \
  int run_gram(const xk_gram_args*);               \
  int run_channel_mix(const xk_channel_mix_args*); \
  int run_xfa_forward(const xk_xfa_args*);         \
  int run_xfa_backward(const xk_xfa_args*);        \
  }                                                \
  }
#define XK_ENTRY(level, usable) \
  {#level,                      \
   usable,                      \
   xk::level::run_gram,         \
   xk::level::run_channel_mix,  \
   xk::level::run_xfa_forward,  \
   xk::level::run_xfa_backward}

#ifdef XK_HAVE_x86_64_v4
XK_DECLARE(x86_64_v4)
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
[[maybe_unused]] bool always() { return true; }

struct Level {
  const char* name;
  bool (*usable)();
  int (*gram)(const xk_gram_args*);
  int (*channel_mix)(const xk_channel_mix_args*);
  int (*xfa_forward)(const xk_xfa_args*);
  int (*xfa_backward)(const xk_xfa_args*);
};

// Best first.
const Level kLevels[] = {
#ifdef XK_HAVE_x86_64_v4
    XK_ENTRY(x86_64_v4, has_v4),
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

const Level* choose() {
  const char* asked = getenv("XFORMER_KERNELS_CPU_LEVEL");
  for (const Level& level : kLevels) {
    if (asked && *asked && strcmp(asked, level.name) != 0) continue;
    if (level.usable()) return &level;
  }
  return nullptr;
}

const Level* level() {
  static const Level* const chosen = choose();
  return chosen;
}

}  // namespace

extern "C" {
const char* xk_cpu_level(void) { return level() ? level()->name : ""; }
int xk_gram(const xk_gram_args* args) { return level() ? level()->gram(args) : XK_BAD_ARGUMENT; }
int xk_channel_mix(const xk_channel_mix_args* args) { return level() ? level()->channel_mix(args) : XK_BAD_ARGUMENT; }
int xk_xfa_forward(const xk_xfa_args* args) { return level() ? level()->xfa_forward(args) : XK_BAD_ARGUMENT; }
int xk_xfa_backward(const xk_xfa_args* args) { return level() ? level()->xfa_backward(args) : XK_BAD_ARGUMENT; }
}
