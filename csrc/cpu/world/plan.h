// Which algorithm, cut how finely, stored how: by the size of the call, from measurements.
#pragma once

#include <cstdint>

#include "core/lanes.h"
#include "core/part.h"
#include "cpu/world/types.h"

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

// `bytes`: of the whole tensor that is reduced, gathered or scattered; equal on all ranks, as the
// plan must be. Measured with 2 to 8 ranks on a Zen 5 with 1 MiB of second-level cache a core:
// slices of 256 KiB keep the slots of two ranks in that cache and hide the flags; between 2 ranks
// one shot moves as much as two and waits once, beyond them two shots win from 32 KiB on; results
// larger than what the last-level cache holds beside the inputs are streamed, unless they were just
// read (in place).
inline Plan plan_of(Operation operation, int64_t bytes, int size) {
  constexpr int64_t kKiB = 1024;
  constexpr int64_t kMiB = 1024 * kKiB;
  const Store store = bytes >= 8 * kMiB ? Store::streaming : Store::cached;
  switch (operation) {
    case Operation::all_reduce: {
      const bool one_shot = bytes <= (size == 2 ? 4 * kMiB : 32 * kKiB);
      return {one_shot, one_shot ? 256 * kKiB : 512 * kKiB, Store::cached};
    }
    case Operation::reduce_scatter: return {true, 256 * kKiB, Store::cached};
    default: return {true, 256 * kKiB, store};
  }
}

}  // namespace pyparallel::cpu
