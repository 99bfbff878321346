// How the ranks of a decoder show each other their partial sums, without copies: each writes where the
// others read.
#pragma once

#include <cstdint>

namespace pyparallel::cpu {

class Peers {
 public:
  virtual ~Peers() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // Where this rank writes the `bytes` of its next exchange, at most what was promised at construction.
  virtual void* mine(int64_t bytes) = 0;
  // Shows them, and waits for those of all ranks: parts[r] is rank r's, readable until the next but one
  // call. Throws PeerError.
  virtual void exchange(int64_t bytes, const void** parts) = 0;
};

}  // namespace pyparallel::cpu
