// How a group makes a call: it says what it does, bounds it, and remembers why it failed. For the
// files that implement Group.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/world/group.h"

namespace pyparallel::cpu {

// Calls that move more than this let other threads of the interpreter run meanwhile.
constexpr int64_t kLongBytes = int64_t(256) << 10;

inline Description description(Operation operation, DType dtype, int64_t count,
                               Reduction reduction = Reduction::none, int root = 0,
                               uint64_t split = 0) {
  return {uint32_t(operation), uint32_t(dtype), uint32_t(reduction), root, count, split, 0, 0};
}

template <class Body>
void Group::guard(const Description& doing, bool long_call, Body body) {
  waiter_.enter(doing, long_call);
  try {
    body();
  } catch (const PeerError& error) {
    waiter_.leave();
    failure_ = std::make_unique<PeerError>(error);
    throw;
  } catch (...) {
    waiter_.leave();
    failure_ = std::make_unique<PeerError>(
        "the group '" + name_ + "' was interrupted in call #" + std::to_string(sequence_),
        name_of(Operation(doing.operation)), sequence_, name_, std::vector<int>{});
    throw;
  }
  waiter_.leave();
}

template <class Body>
void Group::call(Description doing, int64_t slice_bytes, bool long_call, Body body) {
  check_open();
  push_unsent();
  doing.sequence = ++sequence_;
  *world_.header(world_.rank) = doing;
  MemberOf member{world_, lanes_, waiter_, epoch_, signature_of(doing), slice_bytes, Store::cached};
  guard(doing, long_call, [&] { body(member); });
  epoch_ = member.epoch;
}

}  // namespace pyparallel::cpu
