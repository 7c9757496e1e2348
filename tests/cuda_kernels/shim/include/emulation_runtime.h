// What the headers ask of the runtime (runtime.cpp, device.cpp). Reports name the block, the thread and the line.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <source_location>

struct cudaLaunchConfig_st;

namespace xk::emulation {

using Where = std::source_location;

// Ends the kernel: the launch returns cudaErrorLaunchFailure and cudaGetErrorString this text.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void fail_index(const void* array, int64_t index, int64_t count);

int launch(const cudaLaunchConfig_st* config, const void* kernel, void (*call)(void*), void* arguments);

// Shared memory. register_array: [p, p + bytes) is one array of the block; check_span: these bytes, if they are shared
// memory, lie in one array.
unsigned char* shared_base();
void register_array(const void* p, int64_t bytes, Where where);
void check_span(const char* what, const void* p, int64_t bytes, Where where);

int rank_in_cluster();
int blocks_in_cluster();
const void* in_peer(const void* p, int rank, Where where);

// Whether this step of kernels (XK_STEP of csrc/cuda/portable.h) is left out of the launch.
bool is_planted(const char* step);

void block_barrier(Where where);
void cluster_barrier(Where where);

// Warp collectives: all lanes arrive, the last one works for all. arrive is true for that lane, which then calls
// leave; lanes must agree on key. Arguments are exchanged in here, where sanitizers do not look: no collective but
// __syncwarp orders memory.
bool arrive(const char* what, uint64_t key, void* argument, Where where);
void leave();
void sync_warp(unsigned mask, Where where);
uint64_t shuffle(const char* what, unsigned mask, uint64_t value, int source, Where where);

// Fragments: a matrix of count elements over 32 lanes, which arrived with the addresses of theirs.
void scatter(const void* matrix, int count, size_t element_size);
void gather(void* matrix, int count, size_t element_size);
enum class Multiplicand { half, bfloat16, tf32 };
void multiply(Multiplicand type, const void* a, const void* b, const float* c, float* d, Where where);

// mma.sync.m16n8k16 (m16n8k8 of tf32) by its registers, as the PTX manual lays them out: d += a b. Tensor cores cut
// fp32 to tf32, multiply exactly, and cut off the sum of all products and d.
void multiply_registers(Multiplicand type, const uint32_t* a, uint32_t b0, uint32_t b1, float* d, Where where);

// Asynchronous copies: where they may go, and what to write there, now or when waited for.
void check_copy(const void* to, const void* from, size_t size, size_t zeros, Where where);
void copy_async(void* to, const void* bytes, size_t size);
void commit_copies();
void wait_copies(int groups);

}  // namespace xk::emulation
