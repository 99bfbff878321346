// What a rank is told when its group cannot go on.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace pyparallel::cpu {

// A peer is dead, stuck, gone, or made another call. `missing` holds the ranks that did not come;
// it is empty when all came and one of them does something else.
struct PeerError : std::runtime_error {
  PeerError(const std::string& message, std::string operation, uint64_t sequence, std::string group,
            std::vector<int> missing)
      : std::runtime_error(message),
        operation(std::move(operation)),
        sequence(sequence),
        group(std::move(group)),
        missing(std::move(missing)) {}

  std::string operation;
  uint64_t sequence;
  std::string group;
  std::vector<int> missing;
};

// The caller asked, from a signal handler, to stop waiting; the handler's own error is pending.
struct Interrupted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace pyparallel::cpu
