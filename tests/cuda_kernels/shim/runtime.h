// What runtime.cpp (threads, barriers, shared memory) and warp.cpp (collectives, copies) and device.cpp share.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "fiber.h"

namespace xk::emulation {

constexpr int kMaxThreads = 1024, kMaxCluster = 16, kMaxArrays = 128;
constexpr size_t kMaxShared = 256 << 10;

struct Site {
  const char* what = nullptr;
  Where where;
  bool operator==(const Site& other) const;
};

struct Copy {
  void* to;
  uint32_t bytes[4];
  int size, group;
  bool landed;
};

struct Block;

struct Thread : Fiber {
  Block* block = nullptr;
  int index = 0;
  bool exited = true;
  Site site;               // what it waits at, if anything
  Thread* next = nullptr;  // in the list of those who wait for the same
  std::vector<Copy> copies;
  int group = 0;  // of copies: the open one
};

struct Barrier {
  Thread* waiting = nullptr;
  int arrived = 0;
  char all_here, all_leave;  // tokens. Two, so that who leaves late does not learn of what was done after leaving
};

struct Warp {
  Barrier barrier;
  Site site;
  uint64_t key = 0;
  void* arguments[32];
};

struct Array {
  const unsigned char* begin;
  int64_t bytes;
  Where where;
};

struct Block {
  uint3 index;
  int rank, live;
  unsigned char* shared;
  Barrier barrier;
  Site site, cluster_site;  // of the first to arrive
  int at_cluster_barrier;
  Warp warps[kMaxThreads / 32];
  Array arrays[kMaxArrays];
  int array_count;
};

struct Launch {
  void (*call)(void*);
  void* arguments;
  int threads, cluster;
  dim3 cluster_shape;
  size_t shared_bytes;
  dim3 grid, block;
};

extern Thread* current;
uint64_t random_bits();  // 0 in plain order
void suspend(Barrier& barrier);
void wake(Barrier& barrier);
bool in_own_shared(const void* p);
bool run(const Launch& launch);  // false if it failed: the report says why

extern thread_local char report[8192];

}  // namespace xk::emulation
