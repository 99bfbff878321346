#include "cpu/ops/team.h"

#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>

namespace pyparallel::cpu {

Team::Team(int size, std::vector<int> cores) : size_(size) {
  if (size < 1)
    throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(size));
  if (!cores.empty() && int(cores.size()) != size) {
    throw std::invalid_argument("cores: expected one for each of the " + std::to_string(size) +
                                " threads, got " + std::to_string(cores.size()));
  }
  try {
    threads_.reserve(size - 1);
    for (int t = 1; t < size; ++t) {
      threads_.emplace_back(&Team::work, this, t, cores.empty() ? -1 : cores[t]);
    }
  } catch (const std::exception& error) {
    // Nobody destroys what was not constructed, and a thread that is not joined ends the program.
    const int started = 1 + int(threads_.size());
    stop();
    throw std::runtime_error("threads: expected " + std::to_string(size) + ", the system started " +
                             std::to_string(started) + " (" + error.what() +
                             "); ask for fewer, or raise the limit on processes (ulimit -u)");
  }
}

Team::~Team() { stop(); }

void Team::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_.store(true, std::memory_order_release);
  }
  wake_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Team::fail(std::exception_ptr error) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!error_) error_ = std::move(error);
  failed_.store(true, std::memory_order_release);
}

void Team::run(const std::function<void(int)>& body) {
  if (size_ == 1) return body(0);
  body_ = &body;
  finished_.store(0, std::memory_order_relaxed);
  started_.fetch_add(1, std::memory_order_seq_cst);
  if (asleep_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  try {
    body(0);
  } catch (const Ended&) {
  } catch (...) {
    fail(std::current_exception());
  }
  wait([&] { return finished_.load(std::memory_order_acquire) == size_ - 1; });
  if (failed()) {
    // Nobody is inside the run any more: the barrier can start afresh.
    arrived_.store(0, std::memory_order_relaxed);
    released_.store(0, std::memory_order_relaxed);
    arrived_round_ = 0;
    failed_.store(false, std::memory_order_relaxed);
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

void Team::work(int thread, int core) {
  if (core >= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    // A hint: a core that is not ours to use is refused, and the thread runs where it may.
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
  }
  uint64_t seen = 0;
  const auto called = [&] {
    return started_.load(std::memory_order_seq_cst) != seen ||
           stopping_.load(std::memory_order_acquire);
  };
  while (true) {
    const auto since = std::chrono::steady_clock::now();
    for (int turn = 0; !called(); ++turn) {
      if (turn < kSpins) {
        relax();
        continue;
      }
      std::this_thread::yield();
      if (turn % 64 == 0 &&
          std::chrono::steady_clock::now() - since > std::chrono::milliseconds(2)) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, called);
        asleep_.fetch_sub(1, std::memory_order_relaxed);
      }
    }
    if (stopping_.load(std::memory_order_acquire)) return;
    seen = started_.load(std::memory_order_acquire);
    try {
      (*body_)(thread);
    } catch (const Ended&) {
    } catch (...) {
      fail(std::current_exception());
    }
    finished_.fetch_add(1, std::memory_order_acq_rel);
  }
}

}  // namespace pyparallel::cpu
