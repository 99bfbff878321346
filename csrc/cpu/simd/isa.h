// Which SIMD path runs: asked of the processor once, at run time, so that one build serves every x86-64
// machine (and, by the plain path, every other). Tests and benchmarks may force a narrower one.
#pragma once

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyparallel::cpu {

// Each level includes those before it; avx512_bf16 adds the dot products of bf16 and of bytes (VNNI).
enum class Isa { plain = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

constexpr int kIsaCount = 4;

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "plain";
  }
}

inline Isa detected_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      const bool dots =
          __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
      return dots ? Isa::avx512_bf16 : Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      return Isa::avx2;
    return Isa::plain;
  }();
  return isa;
#else
  return Isa::plain;
#endif
}

// The level of that name; throws if it is unknown or more than this processor has.
inline Isa isa_from_name(const std::string& name) {
  for (int level = 0; level < kIsaCount; ++level) {
    if (name != isa_name(Isa(level))) continue;
    if (level > int(detected_isa())) {
      throw std::invalid_argument("isa: expected at most '" +
                                  std::string(isa_name(detected_isa())) +
                                  "', the widest this processor has, got '" + name + "'");
    }
    return Isa(level);
  }
  throw std::invalid_argument("isa: expected 'plain', 'avx2', 'avx512' or 'avx512_bf16', got '" +
                              name + "'");
}

// The level in use: what the environment variable PYPARALLEL_ISA names, else the widest there is.
inline std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> isa{[] {
    const char* forced = std::getenv("PYPARALLEL_ISA");
    return forced != nullptr && *forced != '\0' ? isa_from_name(forced) : detected_isa();
  }()};
  return isa;
}

}  // namespace pyparallel::cpu
