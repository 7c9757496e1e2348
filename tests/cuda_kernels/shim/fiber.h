// Fibers: a stack of its own for each thread of a cluster, kept from launch to launch, and what sanitizers want to know
// when the stack changes. Sanitizers are weak symbols: the same object serves builds with and without them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace xk::emulation {

#if defined(__x86_64__)
constexpr size_t kPage = 4096;
#else
constexpr size_t kPage = 64 << 10;  // a multiple of any
#endif

struct Fiber {
  void* context = nullptr;  // where it stopped
  unsigned char* stack = nullptr;
  size_t stack_bytes = 0;
  void* asan = nullptr;
  void* tsan = nullptr;
};

void make_stack(Fiber& fiber);
// Starts anew, at `entry`, at the next switch. `abandoned`: it was left in the middle of something.
void reset(Fiber& fiber, int index, void (*entry)(), bool abandoned);
void switch_fiber(Fiber& from, Fiber& to);
void fiber_entered();  // the first thing that `entry` does
bool guards_stack(const Fiber& fiber, const void* p);
void adopt(Fiber& main);  // the calling thread

// Order of memory accesses, for TSan.
void order_before(void* token);
void order_after(void* token);
void record_write(void* p, size_t size, void* pc);
bool under_tsan();

// Memory that is no array, for ASan.
void poison(void* p, size_t bytes);
void unpoison(void* p, size_t bytes);
bool is_poisoned(const void* p);

}  // namespace xk::emulation
