// Peers over the engine's group: partial sums lie in symmetric memory, in four slots used in turn.
//
// Exchange k is written before k - 1 is awaited, but after k - 2 was: its peers have then announced k - 2, so
// they have read k - 4, whose slot it is.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>

#include "core/part.h"
#include "cpu/decoder/peers.h"
#include "cpu/world/group.h"

namespace pyparallel::cpu {

class GroupPeers : public Peers {
 public:
  // A call of all ranks, with the same `bytes`: the most an exchange can carry.
  GroupPeers(Group& group, int64_t bytes)
      : group_(group),
        slot_bytes_(round_up(bytes, 4096)),
        window_(group.window(kSlots * round_up(bytes, 4096))) {}

  int rank() const override { return group_.rank(); }
  int size() const override { return group_.size(); }

  void* mine(int64_t bytes) override {
    check(bytes);
    return slot(group_.rank(), turn_);
  }

  void announce(int64_t bytes) override {
    check(bytes);
    group_.announce(bytes, DType::uint8);
    ++turn_;
  }

  void await(const void** parts) override {
    group_.await();
    for (int r = 0; r < group_.size(); ++r) parts[r] = slot(r, turn_ - 1);
  }

 private:
  static constexpr int64_t kSlots = 4;

  unsigned char* slot(int rank, int64_t turn) const {
    return window_->of(rank) + turn % kSlots * slot_bytes_;
  }
  void check(int64_t bytes) const {
    if (bytes > slot_bytes_) {
      throw std::invalid_argument("exchange: expected at most " + std::to_string(slot_bytes_) +
                                  " bytes, got " + std::to_string(bytes));
    }
  }

  Group& group_;
  int64_t slot_bytes_;
  std::unique_ptr<Window> window_;
  int64_t turn_ = 0;
};

}  // namespace pyparallel::cpu
