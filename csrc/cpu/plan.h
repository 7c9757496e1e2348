// How a (batch, heads, tokens) problem is split into units of work, and how threads process them.
#pragma once

#include <stdlib.h>

#include "block.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace xk {
namespace XK_LEVEL {
namespace {

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
struct Buffer {
  T* data;
  explicit Buffer(size_t count) : data((T*)aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)) {}
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// Calls f(unit, thread) for each unit. Results must depend only on the unit, so that they are bitwise the same for any
// number of threads.
template <class F>
void parallel_for(int64_t units, [[maybe_unused]] int threads, F f) {
#if defined(_OPENMP)
  if (threads > 1 && units > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t u = 0; u < units; ++u) f(u, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t u = 0; u < units; ++u) f(u, 0);
}

// Calls f(thread, threads, wait) in at most `threads` threads at once. wait() is a barrier: after it, each thread sees
// what the others wrote before it.
template <class F>
void together([[maybe_unused]] int threads, F f) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    f(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
    return;
  }
#endif
  f(0, 1, [] {});
}

// How a (batch, heads, tokens) problem is split; depends only on its shape and layout. A unit is (batch, group of
// heads, chunk of tokens). The heads of a token are adjacent in memory, so a unit loops over blocks of tokens and,
// inside, over its heads. Channel-major heads are not adjacent, and are processed one after another.
struct Plan {
  int64_t batch, heads, tokens, chunks, chunk, group, groups;
  int block;                          // tokens packed at a time; at most widest_block
  int64_t together = kHeadsTogether;  // heads per block of tokens

  // multiple: blocks have a multiple of it, if tokens are channel-major; otherwise 0
  Plan(int64_t batch, int64_t heads, int64_t tokens, int dim, int widest_block, int itemsize, int multiple = 0)
      : batch(batch), heads(heads), tokens(tokens) {
    const int64_t target = 64, shortest = 1024;
    int64_t matrix = (int64_t)dim * dim * itemsize;
    chunks = least(divide_up(target, most(batch, 1)), tokens / shortest);
    chunks = most(least(chunks, (512 << 10) / matrix), 1);
    int64_t blocks = divide_up(most(divide_up(tokens, chunks), 1), widest_block);
    const int64_t whole = multiple ? multiple : 4;  // few smaller tiles at the end of a block
    block = int(divide_up(divide_up(divide_up(most(tokens, 1), chunks), blocks), whole) * whole);
    chunk = blocks * block;
    int64_t fits = most((256 << 10) / matrix, 1), wanted = divide_up(8, most(batch * chunks, 1));
    groups = least(most(divide_up(heads, fits), wanted), heads);
    group = groups ? divide_up(heads, groups) : 1;
    groups = divide_up(heads, group);
    if (multiple) together = 1;
  }
  int64_t units() const { return batch * groups * chunks; }
};

struct Unit {
  int64_t b, h0, h1, s, n0, n1;
  Unit(const Plan& p, int64_t u)
      : b(u / (p.groups * p.chunks)),
        h0(u / p.chunks % p.groups * p.group),
        h1(least(h0 + p.group, p.heads)),
        s(u % p.chunks),
        n0(s * p.chunk),
        n1(least(n0 + p.chunk, p.tokens)) {}
};

// Processes a unit's tokens; make(h) returns the Pass of a head.
template <class T, class F>
void sweep(const Plan& plan, const Unit& u, int widest, T* scratch, F make) {
  Heads<T> heads;
  heads.tokens = plan.block;
  heads.end = u.n1;
  for (int64_t h = u.h0; h < u.h1; h += plan.together) {
    heads.count = int(least(u.h1 - h, plan.together));
    for (int i = 0; i < heads.count; ++i) {
      heads.passes[i] = make(h + i);
      choose_rows(heads.passes[i]);
    }
    for (int64_t n = u.n0; n < u.n1; n += plan.block)
      for (heads.index = 0; heads.index < heads.count; ++heads.index)
        Block<T>(heads, n, int(least(plan.block, u.n1 - n)), widest, scratch).run();
  }
}

template <class T>
void zero(T* p, size_t count) {
  memset(p, 0, count * sizeof(T));
}

template <class T>
void sum_chunks(T* first, int64_t chunks, size_t count) {
  for (int64_t s = 1; s < chunks; ++s)
    for (size_t i = 0; i < count; i += VL<T>) store(first + i, load(first + i) + load(first + s * count + i));
}

double load_scalar(const void* p, int64_t i, int dtype) {
  double x = 0;
  with_any_storage(dtype, [&](auto* storage) { x = widen(((const decltype(storage))p)[i]); });
  return x;
}
void store_scalar(void* p, int64_t i, int dtype, double x) {
  with_any_storage(dtype, [&](auto* storage) {
    if constexpr (sizeof(*storage) == sizeof(double))
      ((double*)p)[i] = x;
    else
      narrow((decltype(storage))p + i, float(x));
  });
}

template <class T>
void set_mask(Pass<T>& pass, const xk_mask& mask, int64_t b) {
  if (!mask.data) return;
  pass.mask = mask.data + b * mask.stride_b;
  pass.mask_stride = mask.stride_n;
}

}  // namespace
}  // namespace XK_LEVEL
}  // namespace xk
