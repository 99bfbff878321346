// The folds in AVX-512.
#include <cstdint>
#include <cstring>

#include "cpu/world/fold.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
// GCC 12 reports its own intrinsics' deliberately undefined operands (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")

namespace pyparallel::cpu {
namespace {

#include "cpu/simd/avx512.inl"

// Up to the first line of dst and after its last whole one, plain copies.
void stream(void* dst, const void* src, int64_t bytes) {
  auto* to = static_cast<char*>(dst);
  const auto* from = static_cast<const char*>(src);
  const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(to) % 64);
  const int64_t head = misaligned == 0 ? 0 : 64 - misaligned;
  if (bytes < head + 64) {
    std::memcpy(to, from, size_t(bytes));
    return;
  }
  std::memcpy(to, from, size_t(head));
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    for (int k = 0; k < 64; k += 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i + k),
                           _mm512_loadu_si512(reinterpret_cast<const __m512i*>(from + i + k)));
    }
  }
  // Streaming stores are not ordered by a release; the fence makes them so.
  _mm_sfence();
  std::memcpy(to + i, from + i, size_t(bytes - i));
}

#include "cpu/world/fold.inl"

}  // namespace

const Folds& folds_avx512() { return kFolds; }

}  // namespace pyparallel::cpu

#pragma GCC pop_options
#else
namespace pyparallel::cpu {

const Folds& folds_avx512() { return folds_plain(); }

}  // namespace pyparallel::cpu
#endif
