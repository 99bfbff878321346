#include "cuda/world/peer_group.h"

#include <cuda_runtime_api.h>

#include <cstring>

#include "core/atomic.h"

namespace pyparallel::cuda {
namespace {

void check_status(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": CUDA error " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

std::vector<int> ranks_in(uint64_t mask) {
  std::vector<int> ranks;
  for (int r = 0; r < 64; ++r) {
    if (mask >> r & 1) ranks.push_back(r);
  }
  return ranks;
}

std::string text_of(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(ranks[i]);
  return text;
}

}  // namespace

const char* name_of(PeerOperation operation) {
  static constexpr const char* kNames[] = {"nothing",    "all_reduce",     "reduce_scatter",
                                           "all_gather", "all_to_all",     "broadcast",
                                           "barrier",    "all_reduce_norm"};
  return uint32_t(operation) < sizeof kNames / sizeof *kNames ? kNames[uint32_t(operation)]
                                                              : "an unknown call";
}

uint64_t hash_of(const Split& split, int size) {
  uint64_t hash = 0;
  for (int r = 1; r <= size; ++r) hash = (hash ^ uint64_t(split.begin[r])) * 0x9e3779b97f4a7c15u;
  return hash;
}

IpcSegments::IpcSegments(int64_t bytes) {
  check_status(cudaMalloc(&own_, size_t(bytes)), "cudaMalloc of the peer segment");
  check_status(cudaMemset(own_, 0, size_t(bytes)), "cudaMemset of the peer segment");
  // Peers may write flags as soon as they have the handle; the zeros must be there before.
  check_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

IpcSegments::~IpcSegments() {
  close();
  (void)cudaFree(own_);
}

void IpcSegments::close() {
  for (void* address : opened_) (void)cudaIpcCloseMemHandle(address);
  opened_.clear();
}

std::string IpcSegments::handle() const {
  cudaIpcMemHandle_t handle;
  check_status(cudaIpcGetMemHandle(&handle, own_), "cudaIpcGetMemHandle");
  return std::string(reinterpret_cast<const char*>(&handle), sizeof handle);
}

std::vector<uintptr_t> IpcSegments::open(int rank, const std::vector<std::string>& handles) {
  std::vector<uintptr_t> bases;
  for (int r = 0; r < int(handles.size()); ++r) {
    void* address = own_;
    if (r != rank) {
      cudaIpcMemHandle_t handle;
      if (handles[size_t(r)].size() != sizeof handle) {
        throw std::invalid_argument("handles: expected " + std::to_string(sizeof handle) +
                                    " bytes from rank " + std::to_string(r) + ", got " +
                                    std::to_string(handles[size_t(r)].size()));
      }
      std::memcpy(&handle, handles[size_t(r)].data(), sizeof handle);
      check_status(cudaIpcOpenMemHandle(&address, handle, cudaIpcMemLazyEnablePeerAccess),
                   "cudaIpcOpenMemHandle");
      opened_.push_back(address);
    }
    bases.push_back(reinterpret_cast<uintptr_t>(address));
  }
  return bases;
}

int64_t PeerGroup::segment_bytes(int size, int64_t slot_bytes) {
  return PeerWorld::segment_bytes(size, slot_bytes);
}

PeerGroup::PeerGroup(std::string name, int rank, int64_t slot_bytes, double timeout_seconds,
                     const std::vector<uintptr_t>& bases)
    : name_(std::move(name)) {
  const int size = int(bases.size());
  if (size < 1 || size > kMaxPeers) {
    throw std::invalid_argument("bases: expected 1 to " + std::to_string(kMaxPeers) +
                                " ranks, got " + std::to_string(size) + "; use NCCL");
  }
  if (rank < 0 || rank >= size) {
    throw std::invalid_argument("rank: expected 0 to " + std::to_string(size - 1) + ", got " +
                                std::to_string(rank));
  }
  if (slot_bytes < kLine * (size + 2) || slot_bytes % kLine != 0) {
    throw std::invalid_argument("slot_bytes: expected a multiple of " + std::to_string(kLine) +
                                " of at least " + std::to_string(kLine * (size + 2)) + ", got " +
                                std::to_string(slot_bytes));
  }
  peers_.rank = rank;
  peers_.size = size;
  peers_.slot_bytes = slot_bytes;
  peers_.timeout_ns = uint64_t(timeout_seconds * 1e9);
  for (int r = 0; r < size; ++r)
    peers_.base[r] = reinterpret_cast<unsigned char*>(bases[size_t(r)]);
  void* fault = nullptr;
  check_status(cudaHostAlloc(&fault, sizeof(PeerFault), cudaHostAllocMapped), "cudaHostAlloc");
  peers_.fault = static_cast<PeerFault*>(std::memset(fault, 0, sizeof(PeerFault)));
  void* epochs = nullptr;
  check_status(cudaMalloc(&epochs, kPeerBlocks * sizeof(uint32_t)), "cudaMalloc of the epochs");
  peers_.epochs = static_cast<uint32_t*>(epochs);
  check_status(cudaMemset(epochs, 0, kPeerBlocks * sizeof(uint32_t)), "cudaMemset of the epochs");
  check_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

PeerGroup::~PeerGroup() {
  (void)cudaFree(peers_.epochs);
  (void)cudaFreeHost(peers_.fault);
}

PeerCall PeerGroup::begin(PeerOperation operation, uint32_t dtype, Reduction reduction, int root,
                          int64_t count, uint64_t split) {
  check();
  ++sequence_;
  recent_[sequence_ % kRemembered] = operation;
  return {peers_,
          {uint32_t(operation), dtype, uint32_t(reduction), root, count, split, sequence_, 0}};
}

void PeerGroup::copy(uintptr_t to, uintptr_t from, int64_t bytes, cudaStream_t stream) {
  check();
  if (bytes <= 0) return;
  check_status(cudaMemcpyAsync(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from),
                               size_t(bytes), cudaMemcpyDefault, stream),
               "cudaMemcpyAsync between peers");
}

void PeerGroup::fail(const std::vector<int>& missing) {
  uint64_t mask = 0;
  for (const int rank : missing) mask |= uint64_t(1) << rank;
  __atomic_fetch_or(&peers_.fault->missing, mask, __ATOMIC_RELAXED);
  // A fault that a kernel has recorded keeps its number.
  uint64_t none = 0;
  __atomic_compare_exchange_n(&peers_.fault->sequence, &none, sequence_ == 0 ? 1 : sequence_, false,
                              __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

void PeerGroup::check() {
  if (failure_) throw *failure_;
  const uint64_t sequence = load_acquire(&peers_.fault->sequence);
  if (sequence == 0) return;
  const std::vector<int> missing = ranks_in(load_acquire(&peers_.fault->missing));
  const std::vector<int> differing = ranks_in(load_acquire(&peers_.fault->mismatch));
  const std::string operation =
      sequence_ - sequence < kRemembered ? name_of(recent_[sequence % kRemembered]) : "a call";
  std::string text = operation + " #" + std::to_string(sequence) + " of group '" + name_ +
                     "' (rank " + std::to_string(rank()) + " of " + std::to_string(size()) + "): ";
  if (!differing.empty()) {
    text += text_of(differing) +
            " made another call; check that all ranks pass the same shapes, "
            "dtypes and operations in the same order";
  } else {
    text += text_of(missing) + " died, or did not come within " +
            std::to_string(double(peers_.timeout_ns) * 1e-9) + " s";
  }
  failure_ = std::make_unique<PeerError>(text, operation, sequence, name_,
                                         differing.empty() ? missing : std::vector<int>{});
  throw *failure_;
}

}  // namespace pyparallel::cuda
