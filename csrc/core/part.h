// Ranges of nearly equal parts: the one rule by which anything is cut over ranks, blocks or lanes.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PP_HOST_DEVICE __host__ __device__ __forceinline__
#define PP_UNROLL _Pragma("unroll")
#else
#define PP_HOST_DEVICE inline
#define PP_UNROLL _Pragma("GCC unroll 16")
#endif

namespace pyparallel {

// The largest group of the engine: tables of this length are passed by value to kernels.
constexpr int kMaxRanks = 64;

// Half-open range [begin, end) of elements.
struct Part {
  int64_t begin;
  int64_t end;
  PP_HOST_DEVICE int64_t size() const { return end - begin; }
};

PP_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PP_HOST_DEVICE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
PP_HOST_DEVICE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
PP_HOST_DEVICE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Part `index` of n elements cut into `parts`: n / parts each, the first n % parts one more.
PP_HOST_DEVICE Part part_of(int64_t n, int parts, int index) {
  const int64_t base = n / parts;
  const int64_t extra = n % parts;
  const int64_t begin = base * index + min_of(index, extra);
  return {begin, begin + base + (index < extra ? 1 : 0)};
}

// The same in units of `grain` elements: every part starts on a unit, all but the last end on one.
PP_HOST_DEVICE Part part_of(int64_t n, int parts, int index, int64_t grain) {
  const Part units = part_of(ceil_div(n, grain), parts, index);
  return {min_of(units.begin * grain, n), min_of(units.end * grain, n)};
}

// A cut into parts of any sizes: part r is [begin[r], begin[r + 1]).
struct Split {
  int64_t begin[kMaxRanks + 1];

  PP_HOST_DEVICE Part operator[](int r) const { return {begin[r], begin[r + 1]}; }

  PP_HOST_DEVICE int64_t largest(int parts) const {
    int64_t most = 0;
    for (int r = 0; r < parts; ++r) most = max_of(most, begin[r + 1] - begin[r]);
    return most;
  }

  PP_HOST_DEVICE static Split equal(int64_t n, int parts) {
    Split split{};
    for (int r = 0; r < parts; ++r) split.begin[r + 1] = part_of(n, parts, r).end;
    return split;
  }
};

}  // namespace pyparallel
