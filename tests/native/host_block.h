// A GPU thread block on the host: one thread a lane, so that a missing sync() is a race the
// sanitizers see. For the bodies of csrc/cuda.
#pragma once

#include <pthread.h>

#include <cmath>
#include <thread>
#include <vector>

#include "core/lanes.h"

namespace pyparallel::test {

// What the lanes of one block share.
struct HostBlock {
  explicit HostBlock(int lanes) : values(size_t(lanes)), flags(size_t(lanes)) {
    pthread_barrier_init(&barrier, nullptr, unsigned(lanes));
  }
  ~HostBlock() { pthread_barrier_destroy(&barrier); }
  HostBlock(const HostBlock&) = delete;
  HostBlock& operator=(const HostBlock&) = delete;

  pthread_barrier_t barrier;
  std::vector<float> values;
  std::vector<char> flags;
};

struct ThreadRowLanes {
  HostBlock* block;
  int lane;

  int index() const { return lane; }
  int count() const { return int(block->values.size()); }
  void sync() const { pthread_barrier_wait(&block->barrier); }
  bool all(bool ok) const {
    block->flags[size_t(lane)] = ok;
    sync();
    bool every = true;
    for (const char flag : block->flags) every = every && flag != 0;
    sync();
    return every;
  }
  float sum(float value) const {
    return over(value, 0.0f, [](float a, float b) { return a + b; });
  }
  float max(float value) const {
    return over(value, -INFINITY, [](float a, float b) { return std::fmax(a, b); });
  }
  template <class T>
  void copy(T* dst, const T* src, int64_t n, Store) const {
    copy_shared(*this, dst, src, n);
  }
  template <class Op, class T, class Source>
  void fold(T* dst, const Source& source, int ranks, int64_t n, Store) const {
    fold_shared<Op>(*this, dst, source, ranks, n);
  }

 private:
  template <class Op>
  float over(float value, float neutral, Op op) const {
    block->values[size_t(lane)] = value;
    sync();
    float total = neutral;
    for (const float other : block->values) total = op(total, other);
    sync();
    return total;
  }
};

// Runs body(lanes) on `count` threads, as the lanes of one block.
template <class Body>
void run_lanes(int count, Body body) {
  HostBlock block(count);
  std::vector<std::thread> threads;
  for (int lane = 0; lane < count; ++lane) {
    threads.emplace_back([&, lane] { body(ThreadRowLanes{&block, lane}); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace pyparallel::test
