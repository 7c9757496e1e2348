// Never compiled with sanitizers.
#include "fiber.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// Else ucontext, which takes twenty times as long.
#if !defined(XK_FIBERS_IN_ASSEMBLY)
#if defined(__x86_64__)
#define XK_FIBERS_IN_ASSEMBLY 1
#else
#define XK_FIBERS_IN_ASSEMBLY 0
#endif
#endif

#define WEAK __attribute__((weak))
extern "C" {
WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
WEAK void __asan_poison_memory_region(const volatile void*, size_t);
WEAK void __asan_unpoison_memory_region(const volatile void*, size_t);
WEAK int __asan_address_is_poisoned(const volatile void*);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned);
WEAK void __tsan_destroy_fiber(void*);
WEAK void __tsan_switch_to_fiber(void*, unsigned);
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
WEAK void __tsan_write_range_pc(void*, unsigned long, void*);
}

#if XK_FIBERS_IN_ASSEMBLY
// The registers that a call keeps, on the stack.
extern "C" void xk_switch(void** from, void* to);
asm(R"(
.text
.hidden xk_switch
.globl xk_switch
.type xk_switch, @function
xk_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size xk_switch, .-xk_switch
)");
#else
#include <ucontext.h>
#endif

namespace xk::emulation {
namespace {

Fiber* previous;  // who made the switch: its stack is what ASan learns of on arrival

}  // namespace

void make_stack(Fiber& fiber) {
  fiber.stack_bytes = __sanitizer_start_switch_fiber || under_tsan() ? 256 << 10 : 64 << 10;
  void* p = mmap(nullptr, fiber.stack_bytes + kPage, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED || mprotect(p, kPage, PROT_NONE)) perror("emulation: a fiber's stack"), abort();
  fiber.stack = static_cast<unsigned char*>(p) + kPage;
  if (under_tsan()) fiber.tsan = __tsan_create_fiber(0);
#if !XK_FIBERS_IN_ASSEMBLY
  fiber.context = new ucontext_t;
#endif
}

void reset(Fiber& fiber, int index, void (*entry)(), bool abandoned) {
  if (abandoned) {
    unpoison(fiber.stack, fiber.stack_bytes);
    if (fiber.tsan) __tsan_destroy_fiber(fiber.tsan), fiber.tsan = __tsan_create_fiber(0);
  }
  fiber.asan = nullptr;
  // Not all at the same distance from a multiple of the stack size, for they would share few lines of the cache.
  const size_t bytes = fiber.stack_bytes - (size_t)(index % 32) * 320;
#if XK_FIBERS_IN_ASSEMBLY
  void** top = reinterpret_cast<void**>(fiber.stack + bytes);
  top[-1] = nullptr;  // the entry returns to nowhere
  top[-2] = reinterpret_cast<void*>(entry);
  memset(top - 8, 0, 6 * sizeof(void*));
  fiber.context = top - 8;
#else
  auto* context = static_cast<ucontext_t*>(fiber.context);
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = bytes;
  makecontext(context, entry, 0);
#endif
}

void adopt(Fiber& main) {
  if (under_tsan()) main.tsan = __tsan_get_current_fiber();
#if !XK_FIBERS_IN_ASSEMBLY
  if (!main.context) main.context = new ucontext_t;
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&from.asan, to.stack, to.stack_bytes);
  if (to.tsan) __tsan_switch_to_fiber(to.tsan, 1);  // 1: it orders nothing
  previous = &from;
#if XK_FIBERS_IN_ASSEMBLY
  xk_switch(&from.context, to.context);
#else
  swapcontext(static_cast<ucontext_t*>(from.context), static_cast<ucontext_t*>(to.context));
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.asan, nullptr, nullptr);
}

void fiber_entered() {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* stack = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &previous->stack_bytes);
  previous->stack = static_cast<unsigned char*>(const_cast<void*>(stack));
}

bool guards_stack(const Fiber& fiber, const void* p) {
  const auto* at = static_cast<const unsigned char*>(p);
  return at >= fiber.stack - kPage && at < fiber.stack;
}

void order_before(void* token) {
  if (__tsan_release) __tsan_release(token);
}

void order_after(void* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}

void record_write(void* p, size_t size, void* pc) {
  if (__tsan_write_range_pc) __tsan_write_range_pc(p, size, pc);
}

bool under_tsan() { return __tsan_switch_to_fiber; }

void poison(void* p, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(p, bytes);
}

void unpoison(void* p, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(p, bytes);
}

bool is_poisoned(const void* p) { return __asan_address_is_poisoned && __asan_address_is_poisoned(p); }

}  // namespace xk::emulation
