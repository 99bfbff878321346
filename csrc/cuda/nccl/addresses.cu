// Where the windows of an NCCL communicator lie in everybody's memory: NCCL's device API knows the
// addresses, and one small kernel asks it for them.
#include <cuda_runtime.h>
#include <nccl.h>

#include "cuda/nccl/communicator.h"

#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 29, 0)
#include <nccl_device.h>
#define PP_NCCL_DEVICE_API 1
#endif

namespace pyparallel::cuda {

#if defined(PP_NCCL_DEVICE_API)
namespace {

void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": CUDA error " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

// addresses [size], then the multicast address if `multimem`; the peers are the ranks whose memory can be
// loaded and stored, which must be the whole group.
__global__ void window_addresses_kernel(const __grid_constant__ ncclDevComm device,
                                        ncclWindow_t window, int size, bool multimem,
                                        void** addresses) {
  for (int r = int(threadIdx.x); r < size; r += int(blockDim.x)) {
    addresses[r] = ncclGetLsaPointer(window, 0, r);
  }
  if (threadIdx.x == 0) {
    addresses[size] = multimem ? ncclGetLsaMultimemPointer(window, 0, device) : nullptr;
  }
}

}  // namespace
#endif

std::vector<uintptr_t> NcclCommunicator::window_addresses(uint64_t window, uintptr_t& multicast) {
#if defined(PP_NCCL_DEVICE_API)
  Lock lock(mutex_);
  begin("window_addresses");
  const auto found = windows_.find(window);
  if (found == windows_.end()) {
    throw std::invalid_argument("window: expected a number allocate_window returned, got " +
                                std::to_string(window));
  }
  ncclCommProperties_t properties = NCCL_COMM_PROPERTIES_INITIALIZER;
  complete(ncclCommQueryProperties(communicator_, &properties), lock);
  if (!properties.deviceApiSupport || properties.nLsaTeams != 1) {
    throw std::runtime_error("window_addresses: the ranks of group '" + name_ +
                             "' cannot load from each other's memory; use NCCL's collectives");
  }
  ncclDevCommRequirements_t requirements = NCCL_DEV_COMM_REQUIREMENTS_INITIALIZER;
  requirements.lsaMultimem = properties.multimemSupport;
  requirements.ginContextCount = 0;
  ncclDevComm device;
  complete(ncclDevCommCreate(communicator_, &requirements, &device), lock);
  std::vector<uintptr_t> addresses(size_t(size_) + 1);
  void* buffer = nullptr;
  const size_t bytes = addresses.size() * sizeof(uintptr_t);
  check_cuda(cudaMallocAsync(&buffer, bytes, stream_), "cudaMallocAsync");
  window_addresses_kernel<<<1, 32, 0, stream_>>>(device, found->second.window, size_,
                                                 properties.multimemSupport,
                                                 static_cast<void**>(buffer));
  check_cuda(cudaGetLastError(), "window_addresses");
  check_cuda(cudaMemcpyAsync(addresses.data(), buffer, bytes, cudaMemcpyDeviceToHost, stream_),
             "cudaMemcpyAsync");
  check_cuda(cudaFreeAsync(buffer, stream_), "cudaFreeAsync");
  check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  complete(ncclDevCommDestroy(communicator_, &device), lock);
  multicast = addresses.back();
  addresses.pop_back();
  return addresses;
#else
  (void)window, (void)multicast;
  throw std::runtime_error("window_addresses: needs NCCL 2.29 or later, built with " +
                           std::to_string(NCCL_VERSION_CODE));
#endif
}

}  // namespace pyparallel::cuda
