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
  // Shows them; mine() is then the next exchange's. Throws PeerError, as does await().
  virtual void announce(int64_t bytes) = 0;
  // Waits for those of all ranks: parts[r] is rank r's, readable until the next but one announce().
  // One exchange at a time: the next is announced after this.
  virtual void await(const void** parts) = 0;
  void exchange(int64_t bytes, const void** parts) {
    announce(bytes);
    await(parts);
  }
};

}  // namespace pyparallel::cpu
