// Memory that an NCCL communicator has registered: windows for its collectives, user buffers for messages.
#include "cuda/nccl/communicator.h"

namespace pyparallel::cuda {

std::pair<uint64_t, uintptr_t> NcclCommunicator::allocate_window(int64_t bytes) {
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 27, 0)
  Lock lock(mutex_);
  begin("allocate_window");
  Window made{};
  if (ncclMemAlloc(&made.memory, size_t(bytes)) != ncclSuccess) return {0, 0};
  // Refusing is an answer, and the same on all ranks: the memory then stays unknown to NCCL.
  if (!accepted(ncclCommWindowRegister(communicator_, made.memory, size_t(bytes), &made.window,
                                       NCCL_WIN_COLL_SYMMETRIC),
                lock) ||
      made.window == nullptr) {
    (void)ncclMemFree(made.memory);
    return {0, 0};
  }
  // The window serves collectives; point-to-point messages look for a user buffer.
  if (!accepted(ncclCommRegister(communicator_, made.memory, size_t(bytes), &made.buffer), lock)) {
    made.buffer = nullptr;
  }
  windows_[next_window_] = made;
  return {next_window_++, reinterpret_cast<uintptr_t>(made.memory)};
#else
  (void)bytes;
  return {0, 0};
#endif
}

void NcclCommunicator::free_window(uint64_t window) {
  Lock lock(mutex_);
  const auto found = windows_.find(window);
  if (found == windows_.end()) return;
  const Window freed = found->second;
  windows_.erase(found);
  deregister(freed, lock);
}

void NcclCommunicator::deregister(const Window& window, Lock& lock) {
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 27, 0)
  // An aborted communicator has forgotten its registrations.
  if (communicator_ != nullptr && !failure_) {
    if (window.buffer != nullptr) complete(ncclCommDeregister(communicator_, window.buffer), lock);
    complete(ncclCommWindowDeregister(communicator_, window.window), lock);
  }
  (void)ncclMemFree(window.memory);
#else
  (void)window, (void)lock;
#endif
}

}  // namespace pyparallel::cuda
