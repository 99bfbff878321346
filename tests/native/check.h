// What the native tests share: a failed expectation ends the program; random numbers by seed.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace pyparallel::test {

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::fflush(stderr);
  std::_Exit(1);
}

inline void expect(bool held, const std::string& what) {
  if (!held) fail(what);
}

// A small generator with its own state, the same sequence on every rank.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 2654435769u + 1) {}
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  }
  int64_t below(int64_t bound) { return int64_t(next() % uint64_t(bound)); }
};

}  // namespace pyparallel::test
