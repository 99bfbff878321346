// The calls of NcclCommunicator that move data.
#include "cuda/nccl/communicator.h"

namespace pyparallel::cuda {
namespace {

template <class Pointer>
Pointer as(uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

}  // namespace

void NcclCommunicator::all_gather(uintptr_t output, uintptr_t input, int64_t count, int dtype,
                                  cudaStream_t stream) {
  Lock lock(mutex_);
  begin("all_gather");
  finish(ncclAllGather(as<const void*>(input), as<void*>(output), size_t(count),
                       ncclDataType_t(dtype), communicator_, stream),
         stream, lock);
}

void NcclCommunicator::reduce_scatter(uintptr_t output, uintptr_t input, int64_t count, int dtype,
                                      int reduction, cudaStream_t stream) {
  Lock lock(mutex_);
  begin("reduce_scatter");
  finish(ncclReduceScatter(as<const void*>(input), as<void*>(output), size_t(count),
                           ncclDataType_t(dtype), ncclRedOp_t(reduction), communicator_, stream),
         stream, lock);
}

void NcclCommunicator::all_reduce(uintptr_t output, uintptr_t input, int64_t count, int dtype,
                                  int reduction, cudaStream_t stream) {
  Lock lock(mutex_);
  begin("all_reduce");
  finish(ncclAllReduce(as<const void*>(input), as<void*>(output), size_t(count),
                       ncclDataType_t(dtype), ncclRedOp_t(reduction), communicator_, stream),
         stream, lock);
}

void NcclCommunicator::broadcast(uintptr_t data, int64_t count, int dtype, int root,
                                 cudaStream_t stream) {
  Lock lock(mutex_);
  begin("broadcast");
  finish(ncclBroadcast(as<const void*>(data), as<void*>(data), size_t(count), ncclDataType_t(dtype),
                       root, communicator_, stream),
         stream, lock);
}

void NcclCommunicator::exchange(const std::vector<Message>& sends,
                                const std::vector<Message>& receives, int dtype,
                                cudaStream_t stream, const char* operation) {
  Lock lock(mutex_);
  begin(operation);
  const auto type = ncclDataType_t(dtype);
  ncclResult_t first = ncclGroupStart();
  const auto note = [&](ncclResult_t result) {
    if (first == ncclSuccess && result != ncclInProgress) first = result;
  };
  for (const Message& m : sends) {
    if (m.count > 0) {
      note(ncclSend(as<const void*>(m.address), size_t(m.count), type, m.peer, communicator_,
                    stream));
    }
  }
  for (const Message& m : receives) {
    if (m.count > 0) {
      note(ncclRecv(as<void*>(m.address), size_t(m.count), type, m.peer, communicator_, stream));
    }
  }
  // The group is ended also after an error: an open one would swallow every later call.
  const ncclResult_t ended = ncclGroupEnd();
  finish(first != ncclSuccess ? first : ended, stream, lock);
}

}  // namespace pyparallel::cuda
