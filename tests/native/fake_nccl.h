// A scripted NCCL and CUDA runtime: every call is written down, and answers what the script says. It takes
// the place of both libraries when csrc/cuda/nccl/*.cpp are linked without them.
#pragma once

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace fake {

struct Script {
  std::mutex mutex;
  std::vector<std::string> calls;
  // How many questions after a call NCCL is still at it, and what it says then.
  int polls_in_progress = 0;
  ncclResult_t outcome = ncclSuccess;
  // By function: what it returns at once, where that is not success or "in progress".
  std::map<std::string, ncclResult_t> refusals;
  bool event_done = true;
  bool capturing = false;
  bool window_is_null = false;
  // When split() stores the child's handle: at once, or so much later.
  int late_child_ms = 0;
  int blocking = -1;
  int priority = 0;
};

inline Script& script() {
  static Script value;
  return value;
}

inline void note(const std::string& call) {
  const std::lock_guard<std::mutex> lock(script().mutex);
  script().calls.push_back(call);
}

inline int count(const std::string& call) {
  const std::lock_guard<std::mutex> lock(script().mutex);
  int found = 0;
  for (const std::string& made : script().calls) found += made == call;
  return found;
}

inline int position(const std::string& call) {
  const std::lock_guard<std::mutex> lock(script().mutex);
  for (size_t i = 0; i < script().calls.size(); ++i) {
    if (script().calls[i] == call) return int(i);
  }
  return -1;
}

inline void reset() {
  Script& s = script();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.calls.clear();
  s.refusals.clear();
  s.polls_in_progress = 0;
  s.outcome = ncclSuccess;
  s.event_done = true;
  s.capturing = s.window_is_null = false;
  s.late_child_ms = 0;
}

// What a function of a non-blocking communicator answers.
inline ncclResult_t answer(const std::string& call) {
  note(call);
  const std::lock_guard<std::mutex> lock(script().mutex);
  const auto refusal = script().refusals.find(call);
  if (refusal != script().refusals.end()) return refusal->second;
  return script().polls_in_progress > 0 ? ncclInProgress : ncclSuccess;
}

inline ncclComm_t some_communicator() {
  static int one;
  return reinterpret_cast<ncclComm_t>(&one);
}

}  // namespace fake

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "fake"; }
const char* cudaGetErrorString(cudaError_t) { return "fake"; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = fake::script().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  fake::script().priority = priority;
  *stream = reinterpret_cast<cudaStream_t>(std::malloc(1));
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  std::free(stream);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  fake::note("event");
  *event = reinterpret_cast<cudaEvent_t>(std::malloc(1));
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  std::free(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  fake::note("record");
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t) {
  const std::lock_guard<std::mutex> lock(fake::script().mutex);
  return fake::script().event_done ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamQuery(cudaStream_t) {
  const std::lock_guard<std::mutex> lock(fake::script().mutex);
  return fake::script().event_done ? cudaSuccess : cudaErrorNotReady;
}

const char* ncclGetErrorString(ncclResult_t) { return "fake error"; }
const char* ncclGetLastError(ncclComm_t) { return "fake detail"; }
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::memset(id, 7, sizeof *id);
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* state) {
  const std::lock_guard<std::mutex> lock(fake::script().mutex);
  fake::Script& s = fake::script();
  *state = s.polls_in_progress > 0 ? ncclInProgress : s.outcome;
  if (s.polls_in_progress > 0) --s.polls_in_progress;
  return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* c, int, ncclUniqueId, int, ncclConfig_t* config) {
  fake::script().blocking = config->blocking;
  *c = fake::some_communicator();
  return fake::answer("init");
}
ncclResult_t ncclCommSplit(ncclComm_t, int color, int, ncclComm_t* child, ncclConfig_t*) {
  const int late_ms = fake::script().late_child_ms;
  *child = color == NCCL_SPLIT_NOCOLOR || late_ms > 0 ? nullptr : fake::some_communicator();
  if (color != NCCL_SPLIT_NOCOLOR && late_ms > 0) {
    std::thread([child, late_ms] {
      std::this_thread::sleep_for(std::chrono::milliseconds(late_ms));
      __atomic_store_n(child, fake::some_communicator(), __ATOMIC_RELEASE);
    }).detach();
  }
  return fake::answer("split");
}
ncclResult_t ncclCommAbort(ncclComm_t) { return fake::note("abort"), ncclSuccess; }
ncclResult_t ncclCommFinalize(ncclComm_t) { return fake::answer("finalize"); }
ncclResult_t ncclCommDestroy(ncclComm_t) { return fake::note("destroy"), ncclSuccess; }
ncclResult_t ncclCommUserRank(ncclComm_t, int* rank) { return *rank = 1, ncclSuccess; }
ncclResult_t ncclCommCount(ncclComm_t, int* count) { return *count = 2, ncclSuccess; }
ncclResult_t ncclAllGather(const void*, void*, size_t, ncclDataType_t, ncclComm_t, cudaStream_t) {
  return fake::answer("all_gather");
}
ncclResult_t ncclReduceScatter(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t,
                               cudaStream_t) {
  return fake::answer("reduce_scatter");
}
ncclResult_t ncclAllReduce(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t,
                           cudaStream_t) {
  return fake::answer("all_reduce");
}
ncclResult_t ncclBroadcast(const void*, void*, size_t, ncclDataType_t, int, ncclComm_t,
                           cudaStream_t) {
  return fake::answer("broadcast");
}
ncclResult_t ncclGroupStart() { return fake::note("group_start"), ncclSuccess; }
ncclResult_t ncclGroupEnd() { return fake::answer("group_end"); }
ncclResult_t ncclSend(const void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t) {
  return fake::answer("send");
}
ncclResult_t ncclRecv(void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t) {
  return fake::answer("recv");
}
ncclResult_t ncclMemAlloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  return fake::note("mem_alloc"), ncclSuccess;
}
ncclResult_t ncclMemFree(void* memory) {
  std::free(memory);
  return fake::note("mem_free"), ncclSuccess;
}
ncclResult_t ncclCommRegister(const ncclComm_t, void* memory, size_t, void** handle) {
  *handle = memory;
  return fake::answer("register");
}
ncclResult_t ncclCommDeregister(const ncclComm_t, void*) { return fake::answer("deregister"); }
ncclResult_t ncclCommWindowRegister(ncclComm_t, void* memory, size_t, ncclWindow_t* window,
                                    int flags) {
  *window = fake::script().window_is_null ? nullptr : reinterpret_cast<ncclWindow_t>(memory);
  return fake::answer(flags == NCCL_WIN_COLL_SYMMETRIC ? "window_register" : "other_window");
}
ncclResult_t ncclCommWindowDeregister(ncclComm_t, ncclWindow_t) {
  return fake::answer("window_deregister");
}
}
