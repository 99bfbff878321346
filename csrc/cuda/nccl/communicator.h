// NCCL for one group of ranks: created without blocking, bounded in every wait, aborted on peer loss.
//
// Calls are enqueued on the stream they are given and return at once. Who waits for the GPU is the
// caller; who watches that it gets there is poll(), called regularly from another thread: it aborts the
// communicator when NCCL reports an error, when a call outlives the timeout, or when told that a peer
// died (fail()), so that kernels that would wait for ever end. From then on every call throws the
// PeerError that tells why.
#pragma once

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda/world/peer_error.h"

namespace pyparallel::cuda {

// One side of a point-to-point message.
struct Message {
  uintptr_t address;
  int64_t count;
  int peer;
};

class NcclCommunicator {
 public:
  // The bytes that one rank makes and all ranks of the group pass to the constructor.
  static std::string unique_id();

  // Runs on the current device; returns when all ranks have come, or throws PeerError after the timeout.
  NcclCommunicator(std::string name, const std::string& id, int rank, int size,
                   double timeout_seconds);
  ~NcclCommunicator();
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  // The sub-group of all ranks that pass the same color, in order of key. All ranks call it; those
  // with color < 0 get null.
  std::unique_ptr<NcclCommunicator> split(int color, int key, const std::string& name);

  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::string& name() const { return name_; }
  uint64_t sequence() const { return sequence_; }
  // This communicator's own stream, of the highest priority the device has.
  cudaStream_t stream() const { return stream_; }

  // Counts are elements of `dtype`, a number of ncclDataType_t; reductions are of ncclRedOp_t. The order
  // of NCCL's sums depends on size and topology: the layers take rank-ordered sums instead.
  void all_gather(uintptr_t output, uintptr_t input, int64_t count, int dtype, cudaStream_t stream);
  void reduce_scatter(uintptr_t output, uintptr_t input, int64_t count, int dtype, int reduction,
                      cudaStream_t stream);
  void all_reduce(uintptr_t output, uintptr_t input, int64_t count, int dtype, int reduction,
                  cudaStream_t stream);
  void broadcast(uintptr_t data, int64_t count, int dtype, int root, cudaStream_t stream);
  // Any number of sends and receives as one group, which no order can deadlock.
  void exchange(const std::vector<Message>& sends, const std::vector<Message>& receives, int dtype,
                cudaStream_t stream, const char* operation);

  // Memory that all ranks allocate and register together (NCCL 2.27): a symmetric window, which NCCL's
  // collectives use without copying, and a user buffer for messages. Returns a number for free_window
  // and the address; 0 if the library or the machine does not support it.
  std::pair<uint64_t, uintptr_t> allocate_window(int64_t bytes);
  void free_window(uint64_t window);

  // Looks for errors and overdue calls; safe from another thread. Throws the PeerError once found.
  void poll();
  // Aborts because of what somebody else knows, such as a peer that died.
  void fail(const std::string& reason, const std::vector<int>& missing);
  // Waits on the host for the work enqueued so far on `stream`, bounded by the timeout.
  void synchronize(cudaStream_t stream);
  void close();

 private:
  struct Pending {
    cudaEvent_t event;
    std::string operation;
    uint64_t sequence;
    std::chrono::steady_clock::time_point deadline;
  };
  using Lock = std::unique_lock<std::mutex>;
  struct Window {
    void* memory;
    void* buffer;  // as a user buffer; null if refused
    ncclWindow_t window;
  };

  NcclCommunicator(std::string name, double timeout_seconds);
  void open_stream();
  void begin(const char* operation);
  void finish(ncclResult_t result, cudaStream_t stream, Lock& lock);
  void pause(std::chrono::steady_clock::time_point deadline, Lock& lock);
  void complete(ncclResult_t result, Lock& lock);
  bool accepted(ncclResult_t result, Lock& lock);
  void await_handle(std::unique_ptr<NcclCommunicator>& child, Lock& lock);
  void deregister(const Window& window, Lock& lock);
  void look(Lock& lock);
  [[noreturn]] void abort_with(const std::string& reason, const std::vector<int>& missing,
                               const std::string& operation, uint64_t sequence);
  cudaEvent_t take_event();
  void free_resources();

  std::string name_;
  int rank_ = 0;
  int size_ = 1;
  std::chrono::duration<double> timeout_;
  ncclComm_t communicator_ = nullptr;
  cudaStream_t stream_ = nullptr;
  std::string operation_ = "init";
  uint64_t sequence_ = 0;
  std::deque<Pending> pending_;
  std::vector<cudaEvent_t> free_events_;
  std::map<uint64_t, Window> windows_;
  uint64_t next_window_ = 1;
  std::unique_ptr<PeerError> failure_;
  std::mutex mutex_;
};

}  // namespace pyparallel::cuda
