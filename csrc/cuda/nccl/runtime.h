// What the communicator's files ask of the CUDA runtime and of the clock.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <stdexcept>
#include <string>

namespace pyparallel::cuda {

using Clock = std::chrono::steady_clock;
// Between two questions whether NCCL or the device is done.
constexpr auto kPollEvery = std::chrono::microseconds(50);

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": CUDA error " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

inline Clock::time_point deadline_of(std::chrono::duration<double> timeout) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(timeout);
}

}  // namespace pyparallel::cuda
