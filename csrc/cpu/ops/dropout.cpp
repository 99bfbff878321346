#include "cpu/ops/dropout.h"

#include <stdexcept>

#include "core/pack.h"
#include "core/part.h"

// The same integers and one product on every instruction set: the clones differ in width alone.
#if defined(__x86_64__) && defined(__linux__)
#define PP_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PP_CLONES
#endif

namespace pyparallel::cpu {
namespace {

constexpr int64_t kBlock = 256;

// keep[i] = all ones where word(first + i, seed) < threshold, else 0.
PP_CLONES
void keep_block(uint32_t* keep, int64_t n, uint64_t first, uint64_t seed, uint64_t threshold) {
  const uint32_t low = uint32_t(first);
  for (int64_t i = 0; i < n; ++i) {
    uint32_t w0 = low + uint32_t(i);
    uint32_t w1 = uint32_t(first >> 32) + uint32_t(w0 < low);
    uint32_t w2 = 0;
    uint32_t w3 = 0;
    uint32_t key0 = uint32_t(seed);
    uint32_t key1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t(0xD2511F53u) * w0;
      const uint64_t b = uint64_t(0xCD9E8D57u) * w2;
      w0 = uint32_t(b >> 32) ^ w1 ^ key0;
      w1 = uint32_t(b);
      w2 = uint32_t(a >> 32) ^ w3 ^ key1;
      w3 = uint32_t(a);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    keep[i] = uint64_t(w0) < threshold ? ~0u : 0u;
  }
}

template <class T>
void apply(const T* x, T* out, const uint32_t* keep, int64_t n, float scale) {
  for (int64_t i = 0; i < n; ++i) {
    const T kept = narrow<T>(widen(x[i]) * scale);
    // Not a product with 0: what is dropped may be infinite.
    out[i] = keep[i] ? kept : T{};
  }
}

template <class T>
void run(const T* x, T* out, int64_t n, uint64_t first, uint64_t seed, uint64_t threshold,
         float scale) {
  uint32_t keep[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t length = min_of(kBlock, n - start);
    keep_block(keep, length, first + uint64_t(start), seed, threshold);
    apply(x + start, out + start, keep, length, scale);
  }
}

}  // namespace

void dropout(const void* x, void* out, DType dtype, int64_t n, uint64_t first, uint64_t seed,
             uint64_t threshold, float scale) {
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    run(static_cast<const T*>(x), static_cast<T*>(out), n, first, seed, threshold, scale);
  };
  switch (dtype) {
    case DType::float32: return typed(float{});
    case DType::bfloat16: return typed(BFloat16{});
    case DType::float16: return typed(Half{});
    default:
      throw std::invalid_argument("dropout: expected float32, bfloat16 or float16, got " +
                                  std::string(name_of(dtype)));
  }
}

}  // namespace pyparallel::cpu
