// The threads that the operations of this folder share, with 64-byte aligned scratch for each, kept between
// calls.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "core/part.h"
#include "cpu/ops/team.h"

namespace pyparallel::cpu {

class Pool {
 public:
  // That of this process. One operation runs at a time.
  static Pool& instance();

  // body(thread, threads, scratch) on each of so many threads.
  template <class Body>
  void run(int threads, int64_t scratch_bytes, Body body) {
    std::lock_guard lock(mutex_);
    if (team_ == nullptr || team_->size() < threads) {
      team_ = std::make_unique<Team>(threads);
      scratch_.resize(size_t(threads));
    }
    for (int t = 0; t < threads; ++t) scratch_[size_t(t)].reserve(scratch_bytes);
    const auto call = [&](int thread) {
      if (thread < threads) body(thread, threads, scratch_[size_t(thread)].data);
    };
    if (threads == 1) return call(0);
    team_->run(call);
  }

 private:
  struct Scratch {
    Scratch() = default;
    Scratch(Scratch&& other) noexcept
        : data(std::exchange(other.data, nullptr)), bytes(std::exchange(other.bytes, 0)) {}
    ~Scratch() { std::free(data); }
    void reserve(int64_t n) {
      if (n <= bytes) return;
      std::free(data);
      data = std::aligned_alloc(64, size_t(round_up(n, 64)));
      bytes = data == nullptr ? 0 : n;
      if (data == nullptr) throw std::bad_alloc();
    }
    void* data = nullptr;
    int64_t bytes = 0;
  };

  std::mutex mutex_;
  std::unique_ptr<Team> team_;
  std::vector<Scratch> scratch_;
};

// Below this many multiplications a call is over before a second thread has begun.
constexpr int64_t kWorthSharing = 1 << 17;

inline int threads_for(int64_t work, int threads) { return work < kWorthSharing ? 1 : threads; }

// body(m) for each of some rows of n elements, a range of rows a thread.
template <class Body>
void for_each_row(int64_t rows, int64_t n, int threads, Body body) {
  Pool::instance().run(threads_for(rows * n * 8, threads), 0, [&](int thread, int count, void*) {
    const Part part = share(rows, count, thread, 1);
    for (int64_t m = part.begin; m < part.end; ++m) body(m);
  });
}

}  // namespace pyparallel::cpu
