// Blocks, threads and barriers of the emulation. One thread runs at a time, until it waits; nothing here is compiled
// with sanitizers.
#include "runtime.h"

#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <mutex>
#include <numeric>
#include <span>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace xk::emulation {

Thread* current = nullptr;
thread_local char report[8192];

namespace {

std::vector<Thread*> pool;  // of thread t of block b of a cluster, at b * threads + t
Block blocks[kMaxCluster];
unsigned char* regions[kMaxCluster];  // guard page, kMaxShared bytes of which the last are used, guard page
size_t opened[kMaxCluster];           // how many of them, in pages; others are protected
std::vector<Thread*> ready;           // the next to run last
Fiber scheduler;
pthread_t owner;
Launch launched;
Barrier cluster_state;
uint64_t random_state = 0;
char started, finished;  // tokens
bool kernel_failed = false, abandoned = false;
bool seed_is_set = false;
uint64_t seed = 0;
char planted[32];

uint64_t seed_of_launch() {
  if (seed_is_set) return seed;
  const char* text = getenv("XK_EMULATION_SEED");
  return text ? strtoull(text, nullptr, 0) : 0;
}

// The bytes that share a page with the shared memory and are not part of it. ASan has them poisoned.
void check_rest_of_pages(const Block& block) {
  const unsigned char* end = regions[block.rank] + kMaxShared;
  if (is_poisoned(block.shared - 1) || is_poisoned(end - 1)) return;
  for (const unsigned char* p = end - opened[block.rank]; p < end; ++p) {
    if (p == block.shared) p += launched.shared_bytes;
    if (p < end && *p != 0xff)
      fail("some thread of the block wrote to byte %lld of %zu bytes of shared memory", (long long)(p - block.shared),
           launched.shared_bytes);
  }
}

void leave_thread() {
  Block& block = *current->block;
  order_before(&finished);
  if (block.live == 1) check_rest_of_pages(block);
  current->exited = true;
  if (--block.live == 0 && launched.cluster > 1) {
    opened[block.rank] = 0;
    mprotect(regions[block.rank], kMaxShared, PROT_NONE);
  }
  switch_fiber(*current, scheduler);
}

void enter_thread() {
  fiber_entered();
  order_after(&started);
  launched.call(launched.arguments);
  leave_thread();
}

void map_region(int rank) {
  void* p = mmap(regions[rank] ? regions[rank] - kPage : nullptr, kMaxShared + 2 * kPage, PROT_NONE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (regions[rank] ? MAP_FIXED : 0), -1, 0);
  if (p == MAP_FAILED) perror("emulation: shared memory"), abort();
  regions[rank] = static_cast<unsigned char*>(p) + kPage;
  opened[rank] = 0;
}

void start_block(int rank, dim3 index) {
  Block& block = blocks[rank];
  if (!regions[rank] || under_tsan()) map_region(rank);  // TSan forgets the block that was here
  const size_t rounded = (launched.shared_bytes + 127) / 128 * 128, open = (rounded + kPage - 1) / kPage * kPage;
  if (opened[rank] != open) {
    mprotect(regions[rank], kMaxShared - open, PROT_NONE);
    mprotect(regions[rank] + kMaxShared - open, open, PROT_READ | PROT_WRITE);
    opened[rank] = open;
  }
  block.index = {index.x, index.y, index.z};
  block.rank = rank;
  block.live = launched.threads;
  block.shared = regions[rank] + kMaxShared - rounded;
  unpoison(regions[rank] + kMaxShared - open, open);
  memset(regions[rank] + kMaxShared - open, 0xff, open);
  poison(regions[rank] + kMaxShared - open, open - rounded);
  poison(block.shared + launched.shared_bytes, rounded - launched.shared_bytes);
  block.array_count = 0;
  block.barrier.waiting = nullptr;
  block.barrier.arrived = block.at_cluster_barrier = 0;
  for (int w = 0; w < launched.threads / 32; ++w)
    block.warps[w].barrier.waiting = nullptr, block.warps[w].barrier.arrived = 0;
  for (int t = launched.threads - 1; t >= 0; --t) {
    Thread& thread = *pool[rank * launched.threads + t];
    reset(thread, t, enter_thread, abandoned);
    thread.block = &block;
    thread.index = t;
    thread.exited = false;
    thread.site.what = nullptr;
    thread.copies.clear();
    thread.group = 0;
  }
}

void switch_to_next(Fiber& from) {
  if (random_state) std::swap(ready[random_bits() % ready.size()], ready.back());
  current = ready.back();
  ready.pop_back();
  threadIdx = {(unsigned)current->index, 0, 0};
  blockIdx = current->block->index;
  switch_fiber(from, *current);
}

void append(const char* format, ...) __attribute__((format(printf, 1, 2)));
void append(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const size_t used = strlen(report);
  vsnprintf(report + used, sizeof report - used, format, arguments);
  va_end(arguments);
}

// Nobody can run and not all have ended: who waits where.
void report_stuck() {
  append("threads wait for others that will not come:");
  for (int b = 0; b < launched.cluster; ++b) {
    const Thread* const* threads = pool.data() + b * launched.threads;
    std::vector<bool> told(launched.threads);
    // Warps in which some wait for others are told of one by one.
    const auto apart = [&](int t) { return blocks[b].warps[t / 32].barrier.arrived ? t / 32 : -1; };
    const auto alike = [&](int t, int u) {
      return apart(t) == apart(u) && threads[t]->exited == threads[u]->exited &&
             (threads[t]->exited || threads[t]->site == threads[u]->site);
    };
    for (int t = 0; t < launched.threads; ++t) {
      if (told[t]) continue;
      int count = 0;
      for (int u = t; u < launched.threads; ++u)
        if (alike(t, u)) told[u] = true, ++count;
      const uint3 i = blocks[b].index;
      append("\n  block (%u, %u, %u): %d thread%s, the first %d, ", i.x, i.y, i.z, count, count == 1 ? "" : "s", t);
      if (threads[t]->exited)
        append("exited");
      else
        append("at %s, %s:%u", threads[t]->site.what, threads[t]->site.where.file_name(),
               threads[t]->site.where.line());
    }
  }
}

void run_cluster(dim3 first) {
  cluster_state.waiting = nullptr;
  cluster_state.arrived = 0;
  ready.clear();
  const dim3 shape = launched.cluster_shape;
  for (int b = 0; b < launched.cluster; ++b)
    start_block(b, {first.x + b % shape.x, first.y + b / shape.x % shape.y, first.z + b / shape.x / shape.y});
  abandoned = false;
  for (int i = launched.cluster * launched.threads - 1; i >= 0; --i) ready.push_back(pool[i]);
  order_before(&started);
  while (!ready.empty() && !kernel_failed) switch_to_next(scheduler);
  current = nullptr;
  for (int b = 0; b < launched.cluster && !kernel_failed; ++b)
    if (blocks[b].live) kernel_failed = true, report_stuck();
  if (kernel_failed) abandoned = true;
}

void on_fault(int signal, siginfo_t* info, void*) {
  if (!current || !pthread_equal(pthread_self(), owner)) {  // not a kernel's: as it would have been without us
    ::signal(signal, SIG_DFL);
    return;
  }
  const char* where = "";
  if (guards_stack(*current, info->si_addr)) where = ", the end of its stack";
  for (int b = 0; b < launched.cluster; ++b) {
    const auto distance = (const unsigned char*)info->si_addr - regions[b];
    if (distance < -(int64_t)kPage || distance >= (int64_t)(kMaxShared + kPage)) continue;
    const bool ended = opened[b] == 0 && blocks[b].live == 0;
    where = distance >= (int64_t)kMaxShared                      ? ", past the shared memory of a block"
            : ended && distance >= blocks[b].shared - regions[b] ? ", the shared memory of a block that has exited"
                                                                 : ", before the shared memory of a block";
  }
  fail("illegal access to address %p%s", info->si_addr, where);
}

}  // namespace

bool Site::operator==(const Site& other) const {
  const auto same = [](const char* a, const char* b) { return a == b || !strcmp(a, b); };
  return where.line() == other.where.line() && where.column() == other.where.column() && same(what, other.what) &&
         same(where.file_name(), other.where.file_name());
}

uint64_t random_bits() {
  if (!random_state) return 0;
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state >> 11;
}

void fail(const char* format, ...) {
  if (current) {
    const uint3 i = current->block->index;
    append("block (%u, %u, %u) thread %d: ", i.x, i.y, i.z, current->index);
  }
  va_list arguments;
  va_start(arguments, format);
  const size_t used = strlen(report);
  vsnprintf(report + used, sizeof report - used, format, arguments);
  va_end(arguments);
  if (!current) fprintf(stderr, "emulation, outside of a kernel: %s\n", report), abort();
  kernel_failed = true;
  order_before(&finished);
  switch_fiber(*current, scheduler);
  abort();
}

void suspend(Barrier& barrier) {
  Thread* me = current;
  me->next = barrier.waiting;
  barrier.waiting = me;
  if (ready.empty())
    switch_fiber(*me, scheduler);
  else
    switch_to_next(*me);
}

void wake(Barrier& barrier) {
  barrier.arrived = 0;
  for (Thread* thread = barrier.waiting; thread; thread = thread->next) ready.push_back(thread);
  barrier.waiting = nullptr;
}

namespace {

void meet(Barrier& barrier, int expected, Site site, Site& first, bool is_first) {
  if (is_first)
    first = site;
  else if (!(first == site))
    fail("%s at %s:%u, while others of its block wait at %s, %s:%u", site.what, site.where.file_name(),
         site.where.line(), first.what, first.where.file_name(), first.where.line());
  current->site = site;
  order_before(&barrier.all_here);
  if (++barrier.arrived < expected) {
    suspend(barrier);
  } else {
    order_after(&barrier.all_here);
    order_before(&barrier.all_leave);
    if (&barrier == &cluster_state)
      for (Block& block : blocks) block.at_cluster_barrier = 0;
    wake(barrier);
  }
  order_after(&barrier.all_leave);
}

}  // namespace

void block_barrier(Where where) {
  Block& block = *current->block;
  meet(block.barrier, launched.threads, {"__syncthreads", where}, block.site, block.barrier.arrived == 0);
}

void cluster_barrier(Where where) {
  Block& block = *current->block;
  meet(cluster_state, launched.threads * launched.cluster, {"cluster_sync", where}, block.cluster_site,
       block.at_cluster_barrier++ == 0);
}

bool is_planted(const char* step) { return !strcmp(step, planted); }

int rank_in_cluster() { return current->block->rank; }
int blocks_in_cluster() { return launched.cluster; }
unsigned char* shared_base() { return current->block->shared; }

static std::span<const Array> arrays_of(const Block& block) { return {block.arrays, (size_t)block.array_count}; }

void register_array(const void* p, int64_t bytes, Where where) {
  Block& block = *current->block;
  const auto* begin = static_cast<const unsigned char*>(p);
  for (const Array& array : arrays_of(block))
    if (array.begin == begin && array.bytes == bytes) return;
  const int64_t end = begin - block.shared + bytes;
  if (bytes < 0 || end > (int64_t)launched.shared_bytes)
    fail("an array of %lld bytes taken at %s:%u ends at byte %lld of the %zu bytes of dynamic shared memory",
         (long long)bytes, where.file_name(), where.line(), (long long)end, launched.shared_bytes);
  if (block.array_count == kMaxArrays) fail("more than %d arrays in shared memory", kMaxArrays);
  block.arrays[block.array_count++] = {begin, bytes, where};
  const auto padding = std::min<int64_t>(-bytes & 127, (int64_t)launched.shared_bytes - end);
  poison(block.shared + end, padding);
  unpoison(block.shared + end - bytes, bytes);
}

void fail_index(const void* p, int64_t index, int64_t count) {
  if (current)
    for (int b = 0; b < launched.cluster; ++b)
      for (const Array& array : arrays_of(blocks[b]))
        if (array.begin == p)
          fail("index %lld of an array of %lld, taken at %s:%u", (long long)index, (long long)count,
               array.where.file_name(), array.where.line());
  fail("index %lld of an array of %lld", (long long)index, (long long)count);
}

void check_span(const char* what, const void* p, int64_t bytes, Where where) {
  const auto* begin = static_cast<const unsigned char*>(p);
  for (int b = 0; b < launched.cluster; ++b) {
    if (begin + bytes <= regions[b] - kPage || begin >= regions[b] + kMaxShared + kPage) continue;
    for (const Array& array : arrays_of(blocks[b]))
      if (begin >= array.begin && begin + bytes <= array.begin + array.bytes) return;
    fail("%s at %s:%u: %lld bytes from byte %lld of shared memory on, which are not in one array", what,
         where.file_name(), where.line(), (long long)bytes, (long long)(begin - blocks[b].shared));
  }
}

const void* in_peer(const void* p, int rank, Where where) {
  const Block& block = *current->block;
  if (rank < 0 || rank >= launched.cluster)
    fail("peer at %s:%u: rank %d in a cluster of %d", where.file_name(), where.line(), rank, launched.cluster);
  const auto offset = static_cast<const unsigned char*>(p) - block.shared;
  if (offset < 0 || offset > (int64_t)launched.shared_bytes)
    fail("peer at %s:%u: not a pointer into the block's own shared memory", where.file_name(), where.line());
  return blocks[rank].shared + offset;
}

bool in_own_shared(const void* p) {
  const auto distance = static_cast<const unsigned char*>(p) - current->block->shared;
  return distance >= 0 && distance < (int64_t)launched.shared_bytes;
}

bool run(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  launched = launch;
  gridDim = launch.grid;
  blockDim = launch.block;
  kernel_failed = false;
  report[0] = 0;
  while ((int)pool.size() < launch.threads * launch.cluster) {
    pool.push_back(new Thread);
    make_stack(*pool.back());
  }
  ready.reserve(pool.size());  // not later, by some thread of the kernel, which sanitizers would see
  owner = pthread_self();
  adopt(scheduler);
  const uint64_t seed = seed_of_launch();
  random_state = seed ? seed * 0x9e3779b97f4a7c15 | 1 : 0;
  const char* left_out = getenv("XK_EMULATION_PLANTED");
  snprintf(planted, sizeof planted, "%s", left_out ? left_out : "");

  alignas(16) static unsigned char signal_stack[64 << 10];
  stack_t mine = {}, before;
  mine.ss_sp = signal_stack;
  mine.ss_size = sizeof signal_stack;
  sigaltstack(&mine, &before);
  struct sigaction fault = {}, segv, bus;
  fault.sa_sigaction = on_fault;
  fault.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return
  sigaction(SIGSEGV, &fault, &segv);
  sigaction(SIGBUS, &fault, &bus);

  const dim3 shape = launch.cluster_shape;
  const dim3 grid(gridDim.x / shape.x, gridDim.y / shape.y, gridDim.z / shape.z);
  const uint64_t clusters = (uint64_t)grid.x * grid.y * grid.z;
  uint64_t at = random_bits() % clusters, step = random_bits() % clusters + 1;
  while (std::gcd(step, clusters) != 1) ++step;
  for (uint64_t n = 0; n < clusters && !kernel_failed; ++n, at = (at + step) % clusters)
    run_cluster({(unsigned)(at % grid.x) * shape.x, (unsigned)(at / grid.x % grid.y) * shape.y,
                 (unsigned)(at / grid.x / grid.y) * shape.z});

  order_after(&finished);  // only now: nothing orders the blocks of a launch
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  sigaltstack(&before, nullptr);
  return !kernel_failed;
}

}  // namespace xk::emulation

// The order of threads and blocks and the time at which copies land: 0 is the plain one.
extern "C" void xk_emulation_set_seed(uint64_t value) {
  xk::emulation::seed_is_set = true;
  xk::emulation::seed = value;
}
