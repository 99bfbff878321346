// A rank's place in a group of GPUs that address each other's memory: what peer kernels are called with.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/world/peer_error.h"
#include "cuda/world/peer_kernels.h"

namespace pyparallel::cuda {

// The segment of this rank and, opened through CUDA IPC, those of its peers on the same machine. Another
// owner is torch's symmetric memory.
class IpcSegments {
 public:
  explicit IpcSegments(int64_t bytes);
  ~IpcSegments();
  IpcSegments(const IpcSegments&) = delete;
  IpcSegments& operator=(const IpcSegments&) = delete;

  // What the other ranks open this rank's segment with; they need it once.
  std::string handle() const;
  // Addresses of all ranks' segments in rank order; handles[rank] is this rank's own and not opened.
  std::vector<uintptr_t> open(int rank, const std::vector<std::string>& handles);
  // Closes the peers' segments; this rank's own lives as long as the object, since peers may use it.
  void close();

 private:
  void* own_ = nullptr;
  std::vector<void*> opened_;
};

class PeerGroup {
 public:
  // bases: every rank's zeroed segment of segment_bytes(), as this rank addresses it.
  PeerGroup(std::string name, int rank, int64_t slot_bytes, double timeout_seconds,
            const std::vector<uintptr_t>& bases);
  ~PeerGroup();
  PeerGroup(const PeerGroup&) = delete;
  PeerGroup& operator=(const PeerGroup&) = delete;

  static int64_t segment_bytes(int size, int64_t slot_bytes);

  int rank() const { return peers_.rank; }
  int size() const { return peers_.size; }
  const std::string& name() const { return name_; }

  // The next call, for a peer kernel; throws what check() throws.
  PeerCall begin(PeerOperation operation, uint32_t dtype, Reduction reduction, int root,
                 int64_t count, uint64_t split);
  // Throws PeerError if a kernel that has run by now found a peer missing or in another call. The
  // group refuses further work from then on, with the same reason.
  void check();
  // Bytes between this rank's memory and a peer's, by a copy engine: no multiprocessor is held. Whoever
  // orders it against the peer is the caller, by a barrier on the same stream.
  void copy(uintptr_t to, uintptr_t from, int64_t bytes, cudaStream_t stream);
  // Tells kernels that wait, from another thread, that these ranks will not come: they give up at once.
  void fail(const std::vector<int>& missing);

 private:
  std::string name_;
  PeerWorld peers_{};
  uint64_t sequence_ = 0;
  // The operation of recent calls, by sequence: a fault is read some calls after the one it befell.
  static constexpr int kRemembered = 256;
  PeerOperation recent_[kRemembered] = {};
  std::unique_ptr<PeerError> failure_;
};

const char* name_of(PeerOperation operation);
// A number that differs, but for chance, when two ranks mean different splits.
uint64_t hash_of(const Split& split, int size);

}  // namespace pyparallel::cuda
