// Warp collectives and asynchronous copies of the emulation. Not compiled with sanitizers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>

#include "runtime.h"

namespace xk::emulation {
namespace {

Warp& my_warp() { return current->block->warps[current->index / 32]; }

// Where element i of a fragment of `count` lies: any permutation that no kernel would guess.
struct Place {
  uint8_t lane, x;
};
template <int count>
constexpr auto kPlaces = [] {
  std::array<Place, count> places{};
  for (int i = 0; i < count; ++i) {
    const int at = (i * 53 + 17) % count;
    places[i] = {(uint8_t)(at % 32), (uint8_t)(at / 32)};
  }
  return places;
}();

const Place* places_of(int count) { return count == 128 ? kPlaces<128>.data() : kPlaces<256>.data(); }

template <class T>
void scatter_as(const T* matrix, int count, void* const* lanes) {
  const Place* places = places_of(count);
  for (int i = 0; i < count; ++i) static_cast<T*>(lanes[places[i].lane])[places[i].x] = matrix[i];
}

template <class T>
void gather_as(T* matrix, int count, void* const* lanes) {
  const Place* places = places_of(count);
  for (int i = 0; i < count; ++i) matrix[i] = static_cast<const T*>(lanes[places[i].lane])[places[i].x];
}

struct Fragments {
  const void *a, *b;
  const float* c;
  float* d;
};

void gather_multiplicand(float* matrix, int count, Multiplicand type, void* const* lanes, Where where) {
  if (type == Multiplicand::tf32) {
    gather_as(matrix, count, lanes);
    for (int i = 0; i < count; ++i) {
      uint32_t bits;
      memcpy(&bits, matrix + i, 4);
      if (matrix[i] == matrix[i] && bits & 0x1fff)
        fail("mma_sync at %s:%u: %a is not rounded to tf32", where.file_name(), where.line(), matrix[i]);
    }
    return;
  }
  uint16_t raw[256];
  gather_as(raw, count, lanes);
  if (type == Multiplicand::half)
    for (int i = 0; i < count; ++i) matrix[i] = __half2float({raw[i]});
  else
    for (int i = 0; i < count; ++i) matrix[i] = __bfloat162float({raw[i]});
}

}  // namespace

bool arrive(const char* what, uint64_t key, void* argument, Where where) {
  Warp& warp = my_warp();
  const Site site{what, where};
  if (warp.barrier.arrived == 0) {
    warp.site = site;
    warp.key = key;
  } else if (!(warp.site == site)) {
    fail("%s at %s:%u, while other lanes of its warp wait at %s, %s:%u", what, where.file_name(), where.line(),
         warp.site.what, warp.site.where.file_name(), warp.site.where.line());
  } else if (warp.key != key) {
    fail("%s at %s:%u: its lanes give different addresses or strides", what, where.file_name(), where.line());
  }
  warp.arguments[current->index % 32] = argument;
  current->site = site;
  if (++warp.barrier.arrived == 32) return true;
  suspend(warp.barrier);
  return false;
}

void leave() { wake(my_warp().barrier); }

void check_mask(const char* what, unsigned mask, Where where) {
  if (mask != ~0u)
    fail("%s at %s:%u: mask %08x; only full warps are emulated", what, where.file_name(), where.line(), mask);
}

void sync_warp(unsigned mask, Where where) {
  check_mask("__syncwarp", mask, where);
  Barrier& barrier = my_warp().barrier;
  order_before(&barrier.all_here);
  if (arrive("__syncwarp", 0, nullptr, where)) {
    order_after(&barrier.all_here);
    order_before(&barrier.all_leave);
    leave();
  }
  order_after(&barrier.all_leave);
}

uint64_t shuffle(const char* what, unsigned mask, uint64_t value, int source, Where where) {
  check_mask(what, mask, where);
  struct {
    uint64_t value;
    int source;
  } mine = {value, source};
  using Mine = decltype(mine);
  if (arrive(what, 0, &mine, where)) {
    auto lanes = reinterpret_cast<Mine* const*>(my_warp().arguments);
    uint64_t values[32];
    for (int l = 0; l < 32; ++l) values[l] = lanes[l]->value;
    for (int l = 0; l < 32; ++l) lanes[l]->value = values[lanes[l]->source & 31];
    leave();
  }
  return mine.value;
}

void scatter(const void* matrix, int count, size_t element_size) {
  if (element_size == 2)
    scatter_as(static_cast<const uint16_t*>(matrix), count, my_warp().arguments);
  else
    scatter_as(static_cast<const uint32_t*>(matrix), count, my_warp().arguments);
}

void gather(void* matrix, int count, size_t element_size) {
  if (element_size == 2)
    gather_as(static_cast<uint16_t*>(matrix), count, my_warp().arguments);
  else
    gather_as(static_cast<uint32_t*>(matrix), count, my_warp().arguments);
}

void multiply(Multiplicand type, const void* a, const void* b, const float* c, float* d, Where where) {
  Fragments mine = {a, b, c, d};
  if (!arrive("mma_sync", 0, &mine, where)) return;
  void *lanes_a[32], *lanes_b[32], *lanes_c[32], *lanes_d[32];
  for (int l = 0; l < 32; ++l) {
    const auto& lane = *static_cast<const Fragments*>(my_warp().arguments[l]);
    lanes_a[l] = const_cast<void*>(lane.a), lanes_b[l] = const_cast<void*>(lane.b);
    lanes_c[l] = const_cast<float*>(lane.c), lanes_d[l] = lane.d;
  }
  const int depth = type == Multiplicand::tf32 ? 8 : 16;
  float left[256], right[256], sum[256];
  gather_multiplicand(left, 16 * depth, type, lanes_a, where);
  gather_multiplicand(right, depth * 16, type, lanes_b, where);
  gather_as(sum, 256, lanes_c);
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < 16; ++n) sum[r * 16 + n] += left[r * depth + k] * right[k * 16 + n];
  scatter_as(sum, 256, lanes_d);
  leave();
}

namespace {

struct Registers {
  const uint32_t* a;
  uint32_t b[2];
  float* d;
};

// The numbers in a register of an operand, of which k comes first in the depth: two of 16 bits, or one.
struct Unpacked {
  int count;
  double x[2];
};
Unpacked unpack(Multiplicand type, uint32_t word) {
  if (type == Multiplicand::half) return {2, {__half2float({(uint16_t)word}), __half2float({(uint16_t)(word >> 16)})}};
  if (type == Multiplicand::bfloat16)
    return {2, {__bfloat162float({(uint16_t)word}), __bfloat162float({(uint16_t)(word >> 16)})}};
  float x;
  word &= 0xffffe000;
  memcpy(&x, &word, 4);
  return {1, {x, 0}};
}

float cut_off(double x) {
  float y = (float)x;
  if (std::fabs(y) > std::fabs(x) && std::isfinite(y)) y = nextafterf(y, 0);
  return y;
}

}  // namespace

void multiply_registers(Multiplicand type, const uint32_t* a, uint32_t b0, uint32_t b1, float* d, Where where) {
  Registers mine = {a, {b0, b1}, d};
  if (!arrive("mma", 0, &mine, where)) return;
  double left[16][16] = {}, right[16][8] = {};
  auto lanes = reinterpret_cast<Registers* const*>(my_warp().arguments);
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; ++r) {
      const Unpacked x = unpack(type, lanes[l]->a[r]);
      for (int i = 0; i < x.count; ++i) left[g + r % 2 * 8][(t + r / 2 * 4) * x.count + i] = x.x[i];
    }
    for (int r = 0; r < 2; ++r) {
      const Unpacked x = unpack(type, lanes[l]->b[r]);
      for (int i = 0; i < x.count; ++i) right[(t + r * 4) * x.count + i][g] = x.x[i];
    }
  }
  const int depth = type == Multiplicand::tf32 ? 8 : 16;
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 4; ++e) {
      const int row = l / 4 + e / 2 * 8, column = l % 4 * 2 + e % 2;
      double sum = lanes[l]->d[e];
      for (int k = 0; k < depth; ++k) sum += left[row][k] * right[k][column];
      lanes[l]->d[e] = cut_off(sum);
    }
  leave();
}

void check_copy(const void* to, const void* from, size_t size, size_t zeros, Where where) {
  constexpr const char* what = "__pipeline_memcpy_async";
  if (size != 4 && size != 8 && size != 16)
    fail("%s at %s:%u: %zu bytes; 4, 8 or 16 are possible", what, where.file_name(), where.line(), size);
  if (zeros > size) fail("%s at %s:%u: %zu zeros of %zu bytes", what, where.file_name(), where.line(), zeros, size);
  if ((uintptr_t)to % size || (uintptr_t)from % size)
    fail("%s at %s:%u: from %p to %p, not both multiples of the size of %zu bytes", what, where.file_name(),
         where.line(), from, to, size);
  if (!in_own_shared(to)) fail("%s at %s:%u: not to shared memory", what, where.file_name(), where.line());
  check_span(what, to, (int64_t)size, where);
}

// By words, as sanitizers see a call of memcpy.
static void write_words(void* to, const void* from, size_t size) {
  for (size_t i = 0; i < size / 4; ++i) static_cast<volatile uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
}

// It may be written at any time from now on until it is waited for: TSan is told of both ends.
void copy_async(void* to, const void* bytes, size_t size) {
  static constexpr uint32_t kNothing[4] = {~0u, ~0u, ~0u, ~0u};
  Copy copy = {to, {}, (int)size, current->group, (random_bits() & 1) != 0};
  write_words(copy.bytes, bytes, size);
  write_words(to, copy.landed ? bytes : kNothing, size);
  record_write(to, size, __builtin_return_address(0));
  current->copies.push_back(copy);
}

void commit_copies() { ++current->group; }

void wait_copies(int groups) {
  auto& copies = current->copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < current->group - groups; ++done) {
    const Copy& copy = copies[done];
    if (!copy.landed) write_words(copy.to, copy.bytes, copy.size);
    record_write(copy.to, (size_t)copy.size, __builtin_return_address(0));
  }
  copies.erase(copies.begin(), copies.begin() + (ptrdiff_t)done);
}

}  // namespace xk::emulation
