// Peers over the engine's group: partial sums lie in symmetric memory, in two halves used in turn.
//
// A half is written again two exchanges later, and whoever has entered the exchange between has read it:
// so no trailing barrier is needed.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>

#include "core/part.h"
#include "cpu/peers.h"
#include "cpu/world_group.h"

namespace pyparallel::cpu {

class GroupPeers : public Peers {
 public:
  // A call of all ranks, with the same `bytes`: the most an exchange can carry.
  GroupPeers(Group& group, int64_t bytes)
      : group_(group), half_(round_up(bytes, 4096)), window_(group.window(2 * round_up(bytes, 4096))) {}

  int rank() const override { return group_.rank(); }
  int size() const override { return group_.size(); }

  void* mine(int64_t bytes) override {
    if (bytes > half_) {
      throw std::invalid_argument("exchange: expected at most " + std::to_string(half_) + " bytes, got " +
                                  std::to_string(bytes));
    }
    return window_->of(group_.rank()) + turn_ % 2 * half_;
  }

  void exchange(int64_t bytes, const void** parts) override {
    group_.exchange(bytes, DType::uint8);
    for (int r = 0; r < group_.size(); ++r) parts[r] = window_->of(r) + turn_ % 2 * half_;
    ++turn_;
  }

 private:
  Group& group_;
  int64_t half_;
  std::unique_ptr<Window> window_;
  int64_t turn_ = 0;
};

}  // namespace pyparallel::cpu
