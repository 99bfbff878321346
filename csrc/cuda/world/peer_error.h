// What a rank is told when its group cannot go on; becomes the same PeerError in Python as on the CPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace pyparallel::cuda {

struct PeerError : std::runtime_error {
  PeerError(const std::string& message, std::string operation_name, uint64_t call,
            std::string group_name, std::vector<int> ranks)
      : std::runtime_error(message),
        operation(std::move(operation_name)),
        sequence(call),
        group(std::move(group_name)),
        missing(std::move(ranks)) {}

  std::string operation;
  uint64_t sequence;
  std::string group;
  // The ranks that did not come; empty when unknown, or when all came and one does something else.
  std::vector<int> missing;
};

}  // namespace pyparallel::cuda
