#include "cuda/nccl/communicator.h"

#include <cstring>
#include <thread>
#include <utility>

#include "cuda/nccl/runtime.h"

namespace pyparallel::cuda {
namespace {

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess &&
         status != cudaStreamCaptureStatusNone;
}

ncclConfig_t non_blocking(const std::string& name) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  config.commName = name.c_str();
  return config;
}

}  // namespace

std::string NcclCommunicator::unique_id() {
  ncclUniqueId id;
  const ncclResult_t result = ncclGetUniqueId(&id);
  if (result != ncclSuccess) {
    throw std::runtime_error(std::string("ncclGetUniqueId: ") + ncclGetErrorString(result));
  }
  return std::string(id.internal, sizeof id.internal);
}

NcclCommunicator::NcclCommunicator(std::string name, double timeout_seconds)
    : name_(std::move(name)), timeout_(timeout_seconds) {}

NcclCommunicator::NcclCommunicator(std::string name, const std::string& id, int rank, int size,
                                   double timeout_seconds)
    : NcclCommunicator(std::move(name), timeout_seconds) {
  ncclUniqueId unique;
  if (id.size() != sizeof unique.internal) {
    const std::string bytes = std::to_string(sizeof unique.internal),
                      got = std::to_string(id.size());
    throw std::invalid_argument("id: expected the " + bytes + " bytes of unique_id(), got " + got);
  }
  if (size < 1 || rank < 0 || rank >= size) {
    const std::string got = std::to_string(rank) + " of " + std::to_string(size);
    throw std::invalid_argument("rank: expected 0 to size - 1, got " + got);
  }
  std::memcpy(unique.internal, id.data(), id.size());
  rank_ = rank;
  size_ = size;
  open_stream();
  ncclConfig_t config = non_blocking(name_);
  Lock lock(mutex_);
  complete(ncclCommInitRankConfig(&communicator_, size, unique, rank, &config), lock);
}

std::unique_ptr<NcclCommunicator> NcclCommunicator::split(int color, int key,
                                                          const std::string& name) {
  std::unique_ptr<NcclCommunicator> child(new NcclCommunicator(name, timeout_.count()));
  {
    Lock lock(mutex_);
    begin("split");
    ncclConfig_t config = non_blocking(child->name_);
    const int part = color < 0 ? NCCL_SPLIT_NOCOLOR : color;
    complete(ncclCommSplit(communicator_, part, key, &child->communicator_, &config), lock);
    if (color >= 0) await_handle(child, lock);
  }
  if (color < 0) return nullptr;
  child->open_stream();
  Lock lock(child->mutex_);
  // The parent is ready when the child's own creation may still be under way.
  child->complete(ncclInProgress, lock);
  child->complete(ncclCommUserRank(child->communicator_, &child->rank_), lock);
  child->complete(ncclCommCount(child->communicator_, &child->size_), lock);
  return child;
}

// NCCL may call a split done, and store the child's handle from a thread of its own later.
void NcclCommunicator::await_handle(std::unique_ptr<NcclCommunicator>& child, Lock& lock) {
  const auto deadline = deadline_of(timeout_);
  try {
    while (__atomic_load_n(&child->communicator_, __ATOMIC_ACQUIRE) == nullptr) {
      complete(ncclInProgress, lock);
      pause(deadline, lock);
    }
  } catch (...) {
    (void)child.release();  // NCCL may yet write there.
    throw;
  }
}

NcclCommunicator::~NcclCommunicator() {
  try {
    close();
  } catch (...) {  // A destructor has nobody to tell; the communicator has been aborted.
  }
  free_resources();
}

void NcclCommunicator::open_stream() {
  int least = 0, greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest),
             "cudaDeviceGetStreamPriorityRange");
  check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest),
             "cudaStreamCreateWithPriority");
}

void NcclCommunicator::free_resources() {
  for (const Pending& pending : pending_) (void)cudaEventDestroy(pending.event);
  for (cudaEvent_t event : free_events_) (void)cudaEventDestroy(event);
  pending_.clear();
  free_events_.clear();
  // Left by an abort: kernels that used the memory have ended with the communicator.
  for (const auto& [number, window] : windows_) (void)ncclMemFree(window.memory);
  windows_.clear();
  if (stream_ != nullptr) (void)cudaStreamDestroy(std::exchange(stream_, nullptr));
}

void NcclCommunicator::begin(const char* operation) {
  if (failure_) throw *failure_;
  if (communicator_ == nullptr) {
    throw PeerError(std::string(operation) + ": the group '" + name_ + "' is closed", operation,
                    sequence_, name_, {});
  }
  operation_ = operation;
  ++sequence_;
}

void NcclCommunicator::pause(Clock::time_point deadline, Lock& lock) {
  const std::string late = "not all ranks came within " + std::to_string(timeout_.count()) + " s";
  if (Clock::now() > deadline) abort_with(late, {}, operation_, sequence_);
  // poll() may abort meanwhile: then this wait ends with its reason.
  lock.unlock();
  std::this_thread::sleep_for(kPollEvery);
  lock.lock();
  if (failure_) throw *failure_;
}

// Waits for a call of a non-blocking communicator to be done with on the host.
void NcclCommunicator::complete(ncclResult_t result, Lock& lock) {
  const auto deadline = deadline_of(timeout_);
  while (result == ncclInProgress) {
    if (ncclCommGetAsyncError(communicator_, &result) != ncclSuccess) result = ncclInternalError;
    if (result == ncclInProgress) pause(deadline, lock);
  }
  if (result == ncclSuccess) return;
  const std::string why =
      std::string("NCCL: ") + ncclGetErrorString(result) + ": " + ncclGetLastError(communicator_);
  if (result == ncclInvalidArgument || result == ncclInvalidUsage) {
    throw std::invalid_argument(operation_ + " on group '" + name_ + "': " + why);
  }
  abort_with(why, {}, operation_, sequence_);
}

// Whether NCCL did what it may also refuse; a call that never ends is a lost peer as everywhere.
bool NcclCommunicator::accepted(ncclResult_t result, Lock& lock) {
  if (result != ncclInProgress) return result == ncclSuccess;
  try {
    complete(result, lock);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

// The end of a call that has enqueued work: notes when it must be done.
void NcclCommunicator::finish(ncclResult_t result, cudaStream_t stream, Lock& lock) {
  complete(result, lock);
  // A captured call runs when its graph is launched, any number of times; the timeout is then that of
  // the calls around the graph.
  if (is_capturing(stream)) return;
  const cudaEvent_t event = take_event();
  check_cuda(cudaEventRecord(event, stream), "cudaEventRecord");
  pending_.push_back({event, operation_, sequence_, deadline_of(timeout_)});
}

cudaEvent_t NcclCommunicator::take_event() {
  while (!pending_.empty() && cudaEventQuery(pending_.front().event) == cudaSuccess) {
    free_events_.push_back(pending_.front().event);
    pending_.pop_front();
  }
  if (free_events_.empty()) {
    cudaEvent_t event;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    return event;
  }
  const cudaEvent_t event = free_events_.back();
  free_events_.pop_back();
  return event;
}

void NcclCommunicator::close() {
  Lock lock(mutex_);
  if (communicator_ == nullptr) return;
  while (!windows_.empty()) {
    const Window window = windows_.begin()->second;
    windows_.erase(windows_.begin());
    deregister(window, lock);
  }
  if (!failure_) {
    // Destroying flushes what was enqueued; a rank whose peers are gone must not wait for them.
    complete(ncclCommFinalize(communicator_), lock);
  }
  (void)ncclCommDestroy(std::exchange(communicator_, nullptr));
}

}  // namespace pyparallel::cuda
