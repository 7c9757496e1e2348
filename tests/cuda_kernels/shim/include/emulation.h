// The CPU's side of csrc/cuda/portable.h.
#pragma once

#include <cuda_runtime.h>

namespace xk::cuda {

constexpr int kSharedAlignment = 128;

// A pointer that knows its array. Arithmetic may leave the array, access may not.
template <class T>
class Shared {
 public:
  Shared() = default;
  Shared(T* array, int64_t count, int64_t at = 0) : array_(array), count_(count), at_(at) {}
  template <class U>
    requires std::is_same_v<const U, T>
  Shared(const Shared<U>& other) : array_(other.array()), count_(other.count()), at_(other.at()) {}

  T& operator[](int64_t i) const {
    if ((uint64_t)(at_ + i) >= (uint64_t)count_) emulation::fail_index(array_, at_ + i, count_);
    return array_[at_ + i];
  }
  T& operator*() const { return (*this)[0]; }
  Shared operator+(int64_t i) const { return {array_, count_, at_ + i}; }
  Shared operator-(int64_t i) const { return {array_, count_, at_ - i}; }
  Shared& operator+=(int64_t i) { return at_ += i, *this; }
  Shared& operator-=(int64_t i) { return at_ -= i, *this; }
  int64_t operator-(const Shared& other) const { return (int64_t)(address() - other.address()) / (int64_t)sizeof(T); }
  auto operator<=>(const Shared& other) const { return address() <=> other.address(); }
  bool operator==(const Shared& other) const { return address() == other.address(); }

  T* array() const { return array_; }
  int64_t count() const { return count_; }
  int64_t at() const { return at_; }

 private:
  intptr_t address() const { return (intptr_t)array_ + at_ * (intptr_t)sizeof(T); }

  T* array_ = nullptr;
  int64_t count_ = 0;
  int64_t at_ = 0;
};

class Arena {
 public:
  explicit Arena(unsigned char* base) : base_(base) {}
  template <class T>
  Shared<T> take(int64_t count, emulation::Where where = emulation::Where::current()) {
    T* p = reinterpret_cast<T*>((uintptr_t)base_ + (uintptr_t)used_);
    const int64_t bytes = count * (int64_t)sizeof(T);
    if (base_) emulation::register_array(p, bytes, where);
    used_ += (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    return {p, count};
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

#define XK_ARENA(name) ::xk::cuda::Arena name(::xk::emulation::shared_base())

inline int cluster_rank() { return emulation::rank_in_cluster(); }
inline int cluster_size() { return emulation::blocks_in_cluster(); }
inline void cluster_sync(emulation::Where where = emulation::Where::current()) { emulation::cluster_barrier(where); }

template <class T>
Shared<T> peer(Shared<T> p, int rank, emulation::Where where = emulation::Where::current()) {
  return {(T*)emulation::in_peer(p.array(), rank, where), p.count(), p.at()};
}

}  // namespace xk::cuda
