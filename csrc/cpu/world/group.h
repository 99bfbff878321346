// A group of CPU ranks over one shared memory: the World, this rank's place in it, and the calls.
//
// Ranks are processes (or threads, in tests) that map the same descriptor. Every call but send and
// receive is made by all ranks in the same order. A call that cannot finish throws PeerError, and
// the group then refuses all further work with the same reason. Not for two threads at once.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/barrier.h"
#include "cpu/world/lanes.h"
#include "cpu/world/shared_memory.h"
#include "cpu/world/types.h"
#include "cpu/world/waiter.h"

namespace pyparallel::cpu {

// Symmetric memory: the same number of bytes of every rank, readable and writable by all.
class Window {
 public:
  Window(Mapping mapping, int64_t stride) : mapping_(std::move(mapping)), stride_(stride) {}
  unsigned char* of(int rank) const { return mapping_.data() + rank * stride_; }
  int64_t bytes() const { return stride_; }

 private:
  Mapping mapping_;
  int64_t stride_;
};

class Group {
 public:
  // Bytes of the shared memory of a group of `size` ranks.
  static int64_t shared_bytes(int size);

  // Takes both kinds of descriptor over. process_descriptors: one a rank, pidfds, -1 where there is
  // none to watch.
  // mapping: where ranks are threads of one process, the memory as all of them see it.
  // Throws std::invalid_argument for a size beyond kMaxRanks, std::system_error if mapping fails.
  Group(std::string name, int rank, int size, int memory_descriptor,
        std::vector<int> process_descriptors, std::shared_ptr<Mapping> mapping = nullptr);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  int rank() const { return world_.rank; }
  int size() const { return world_.size; }
  const std::string& name() const { return name_; }
  Waiter& waiter() { return waiter_; }
  uint64_t sequence() const { return sequence_; }

  void barrier();
  void all_reduce(void* data, int64_t n, DType dtype, Reduction reduction);
  void reduce_scatter(void* output, const void* input, const Split& split, DType dtype,
                      Reduction reduction);
  void all_gather(void* output, const void* input, const Split& split, DType dtype);
  void all_to_all(void* output, const void* input, const Split& output_split,
                  const Split& input_split, DType dtype);
  void broadcast(void* data, int64_t n, DType dtype, int root);
  // Returns at once: what has no room yet is copied, and sent on by later calls or by a thread.
  void send(const void* data, int64_t n, DType dtype, int peer, int tag);
  void receive(void* data, int64_t n, DType dtype, int peer, int tag);

  // For fused operations, without a copy: write up to slot_bytes() to own_slot(), exchange(), then
  // read what the others wrote from slot_of(r) until this rank's next call on the group.
  int64_t slot_bytes() const { return world_.slot_bytes; }
  unsigned char* own_slot() { return world_.slot(world_.rank, epoch_ + 1); }
  void exchange(int64_t count, DType dtype);
  const unsigned char* slot_of(int rank) const { return world_.slot(rank, epoch_); }
  // exchange() in two, for work between them: what this rank wrote is there; what all others wrote
  // is. No other call on the group may come between.
  void announce(int64_t count, DType dtype);
  void await();

  // New symmetric memory of `bytes` a rank, zeros; a call of all ranks, with the same size.
  std::unique_ptr<Window> window(int64_t bytes);

  // Waits until the peers have room for all that was sent.
  void flush();

  // Tells the peers that this rank makes no more calls, and gives the memory back.
  void close();
  bool closed() const { return descriptor_ < 0; }

 private:
  using MemberOf = Member<SimdLanes, Waiter>;

  // Runs body(member) as one call: says what is being done, bounds it, remembers why it failed.
  template <class Body>
  void call(Description doing, int64_t slice_bytes, bool long_call, Body body);
  template <class Body>
  void guard(const Description& doing, bool long_call, Body body);
  void check_open() const;
  // Sends on what has room now; and the thread that does so while the rank is elsewhere.
  void push_unsent();
  void push_in_background();
  void check_peer(const char* argument, int peer) const;

  std::string name_;
  int descriptor_;
  // fork() copies the object; only the process that made it may speak for the rank.
  int owner_;
  std::shared_ptr<Mapping> mapping_;
  World world_{};
  Waiter waiter_;
  SimdLanes lanes_;
  uint32_t epoch_ = 0;
  uint64_t sequence_ = 0;
  int64_t file_bytes_;
  // A message of which the chunks from `next` on wait for room.
  struct Unsent {
    Description said;
    std::vector<unsigned char> data;
    int64_t next;
  };

  // Held to touch unsent_ and sent_, which the thread shares.
  std::mutex sending_;
  std::condition_variable unsent_there_;
  std::atomic<bool> has_unsent_{false};
  bool stop_pushing_ = false;
  std::thread pusher_;
  std::vector<std::deque<Unsent>> unsent_;
  std::vector<uint64_t> sent_;
  std::vector<uint64_t> received_;
  Description announced_{};
  std::unique_ptr<PeerError> failure_;
};

}  // namespace pyparallel::cpu
