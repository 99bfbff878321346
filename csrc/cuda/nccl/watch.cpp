// How a communicator finds out that a call will not be done, and ends it: errors, overdue calls, and what
// another thread knows.
#include <thread>
#include <utility>

#include "cuda/nccl/communicator.h"
#include "cuda/nccl/runtime.h"

namespace pyparallel::cuda {
namespace {

// While another thread captures a graph in the global mode, even asking for an event would spoil its
// capture; in the relaxed mode this thread's questions do not count.
class RelaxedCapture {
 public:
  RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

void NcclCommunicator::abort_with(const std::string& reason, const std::vector<int>& missing,
                                  const std::string& operation, uint64_t sequence) {
  if (communicator_ != nullptr) (void)ncclCommAbort(std::exchange(communicator_, nullptr));
  failure_ = std::make_unique<PeerError>(
      operation + " #" + std::to_string(sequence) + " of group '" + name_ + "' (rank " +
          std::to_string(rank_) + " of " + std::to_string(size_) + "): " + reason,
      operation, sequence, name_, missing);
  throw *failure_;
}

void NcclCommunicator::look(Lock&) {
  if (failure_) throw *failure_;
  if (communicator_ == nullptr) return;
  ncclResult_t state = ncclSuccess;
  if (ncclCommGetAsyncError(communicator_, &state) != ncclSuccess) state = ncclInternalError;
  if (state != ncclSuccess && state != ncclInProgress) {
    abort_with(
        std::string("NCCL: ") + ncclGetErrorString(state) + ": " + ncclGetLastError(communicator_),
        {}, operation_, sequence_);
  }
  while (!pending_.empty() && cudaEventQuery(pending_.front().event) == cudaSuccess) {
    free_events_.push_back(pending_.front().event);
    pending_.pop_front();
  }
  if (!pending_.empty() && Clock::now() > pending_.front().deadline) {
    const Pending stuck = pending_.front();
    abort_with(
        "not done within " + std::to_string(timeout_.count()) + " s; a peer is stuck or gone", {},
        stuck.operation, stuck.sequence);
  }
}

void NcclCommunicator::poll() {
  const RelaxedCapture relaxed;
  Lock lock(mutex_);
  look(lock);
}

void NcclCommunicator::fail(const std::string& reason, const std::vector<int>& missing) {
  Lock lock(mutex_);
  if (failure_ || communicator_ == nullptr) return;
  const bool waiting = !pending_.empty();
  try {
    abort_with(reason, missing, waiting ? pending_.front().operation : operation_,
               waiting ? pending_.front().sequence : sequence_);
  } catch (const PeerError&) {
    // Kept in failure_, for the calls of the thread that uses the group.
  }
}

void NcclCommunicator::synchronize(cudaStream_t stream) {
  const auto deadline = deadline_of(timeout_);
  while (true) {
    const cudaError_t status = cudaStreamQuery(stream);
    {
      Lock lock(mutex_);
      look(lock);
      if (status == cudaErrorNotReady && Clock::now() > deadline) {
        abort_with("not done within " + std::to_string(timeout_.count()) + " s", {}, operation_,
                   sequence_);
      }
    }
    if (status != cudaErrorNotReady) return check_cuda(status, "cudaStreamQuery");
    std::this_thread::sleep_for(kPollEvery);
  }
}

}  // namespace pyparallel::cuda
