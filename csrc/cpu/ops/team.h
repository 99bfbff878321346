// The threads of one rank: they start once, run the same body together, and meet at barriers.
//
// Between runs a worker spins for some microseconds, then yields, then sleeps, so that a decode loop
// finds it awake and an idle process costs nothing. Inside a run a waiting thread spins, then yields,
// so that more threads than cores still move.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "core/part.h"
#include "core/world.h"

namespace pyparallel::cpu {

class Team {
 public:
  // `size` threads, the caller of run() being thread 0; thread t > 0 is pinned to cores[t], if given.
  explicit Team(int size, std::vector<int> cores = {});
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // body(t) on every thread t. What thread 0 throws ends the run on all threads and is rethrown here;
  // a body that throws on another thread does so too.
  void run(const std::function<void(int)>& body);

  // All threads have come here, and see each other's writes. `action` runs on thread 0 in between.
  // Throws on the others what ends their run, if a thread has failed.
  template <class Action>
  void barrier(int thread, Action action) {
    if (size_ == 1) return action();
    if (thread == 0) {
      const uint64_t round = arrived_round_ + uint64_t(size_ - 1);
      wait([&] { return arrived_.load(std::memory_order_acquire) >= round || failed(); });
      if (!failed()) action();
      arrived_round_ = round;
      released_.store(round, std::memory_order_release);
      if (failed()) throw Ended{};
    } else {
      // This thread's round is known from what it was released from last.
      const uint64_t before = released_.load(std::memory_order_relaxed);
      arrived_.fetch_add(1, std::memory_order_acq_rel);
      wait([&] { return released_.load(std::memory_order_acquire) != before || failed(); });
      if (failed()) throw Ended{};
    }
  }
  void barrier(int thread) {
    barrier(thread, [] {});
  }

 private:
  // Unwinds a thread's body when another has failed.
  struct Ended {};

  template <class Ready>
  static void wait(Ready ready) {
    for (int turn = 0; !ready(); ++turn) {
      if (turn < kSpins) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
  }
  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  void work(int thread, int core);
  void fail(std::exception_ptr error);
  // Ends the threads there are, and waits for them.
  void stop();

  // Some microseconds. A yield returns at once where nobody else wants the core.
  static constexpr int kSpins = 500;

  const int size_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* body_ = nullptr;

  // Words that different threads write are a line apart.
  alignas(kLine) std::atomic<uint64_t> arrived_{0};
  alignas(kLine) std::atomic<uint64_t> released_{0};
  alignas(kLine) std::atomic<uint64_t> started_{0};
  alignas(kLine) std::atomic<int> finished_{0};
  alignas(kLine) std::atomic<int> asleep_{0};
  std::atomic<bool> failed_{false};
  std::atomic<bool> stopping_{false};
  uint64_t arrived_round_ = 0;
  std::exception_ptr error_;
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Thread t's share of n, in whole multiples of `grain`.
inline Part share(int64_t n, int threads, int thread, int64_t grain) {
  const int64_t units = ceil_div(n, grain);
  const int64_t begin = units * thread / threads * grain;
  const int64_t end = units * (thread + 1) / threads * grain;
  return {min_of(begin, n), min_of(end, n)};
}

}  // namespace pyparallel::cpu
