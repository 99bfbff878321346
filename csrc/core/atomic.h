// The two memory-order instructions everything else is built on, for words that other ranks write.
//
// store_release publishes every write this rank made (or has observed) before it; load_acquire, on
// seeing that value, makes those writes visible. On the GPU both are of system scope: the other
// rank is another GPU, or a host thread.
#pragma once

#include <cstdint>

#include "core/part.h"

namespace pyparallel {

PP_HOST_DEVICE uint64_t load_acquire(const uint64_t* word) {
#if defined(__CUDA_ARCH__)
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
#else
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
#endif
}

PP_HOST_DEVICE void store_release(uint64_t* word, uint64_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
#else
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
#endif
}

// For words in which only the value matters and nothing is published by it (status, counters).
PP_HOST_DEVICE uint64_t load_relaxed(const uint64_t* word) {
#if defined(__CUDA_ARCH__)
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
#else
  return __atomic_load_n(word, __ATOMIC_RELAXED);
#endif
}

}  // namespace pyparallel
