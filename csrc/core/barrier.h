// THE barrier: how a rank says "what I wrote for epoch e is there" and learns it of all others.
//
// Pattern: release by the writer, acquire by the reader, on one 64-bit word per pair of ranks that
// lies in the reader's memory. The word is epoch << 32 | signature: the signature of what the rank
// is doing rides along, so a peer that does something else is caught at no extra cost.
//
// Epochs grow by one a phase, are never reset, and are compared by wrap-safe difference. Two flag
// words a pair are enough: a peer that has signalled e + 1 waits there for this rank's e + 1, so it
// cannot overwrite the word of epoch e before this rank has seen it.
#pragma once

#include "core/atomic.h"
#include "core/lanes.h"
#include "core/world.h"

namespace pyparallel {

PP_HOST_DEVICE uint64_t flag_word(uint32_t epoch, uint32_t signature) {
  return uint64_t(epoch) << 32 | signature;
}

// Whether a flag word is of epoch `epoch` or later, up to 2^31 epochs apart.
PP_HOST_DEVICE bool has_reached(uint64_t word, uint32_t epoch) {
  return int32_t(uint32_t(word >> 32) - epoch) >= 0;
}

// 32 bits that differ, but for a chance of 2^-32, when any field that ranks must agree on differs.
PP_HOST_DEVICE uint32_t signature_of(const Description& d) {
  uint64_t hash = 0x9e3779b97f4a7c15u;
  const uint64_t fields[6] = {d.operation,       d.dtype, d.reduction, uint64_t(int64_t(d.root)),
                              uint64_t(d.count), d.split};
  for (int i = 0; i < 6; ++i) {
    hash = (hash ^ fields[i]) * 0xff51afd7ed558ccdu;
    hash ^= hash >> 32;
  }
  return uint32_t(hash);
}

// One rank's part in a call: the world, the lanes that run it, how it waits, and where it stands.
//
// A Waiter bounds every wait. A lane that does not see what it waits for calls a begin once, then
// again in every turn; a lane that sees what must not be calls one of the others. All but begin may
// return false to give up, and on the host throw.
//   begin(epoch)                          a wait for the peers' flags of this epoch
//   begin_message(peer, word, target)     a wait for the count at word to reach target (channel.h)
//   again(peer)                           still nothing from this peer
//   mismatch(peer)                        the peer's signature is not this rank's
//   miscounted(peer, expected, sent)      all_to_all: the part from this peer has another size
//   unexpected(peer, said, expected)      receive: the message is not what is asked for
template <class LanesType, class WaiterType>
struct Member {
  // By reference, so that a kernel reads it where it was passed (__grid_constant__).
  const World& world;
  LanesType lanes;
  WaiterType& waiter;
  // The last epoch this block has gone through; kept between calls by the owner.
  uint32_t epoch;
  uint32_t signature;
  // Bytes of a slot this call uses, the same on all ranks; at most world.slot_bytes.
  int64_t slice_bytes;
  // How results are stored, by the size of the call.
  Store store;

  // Everything the lanes wrote before is published to all peers as epoch e.
  PP_HOST_DEVICE void signal(uint32_t e) {
    lanes.sync();
    const uint64_t word = flag_word(e, signature);
    for (int peer = lanes.index(); peer < world.size; peer += lanes.count()) {
      if (peer != world.rank) store_release(world.flag(peer, world.rank, e), word);
    }
  }

  // Waits until every peer has published epoch e; false if the waiter gave up or a peer differs.
  PP_HOST_DEVICE bool wait(uint32_t e) {
    bool ok = true;
    for (int peer = lanes.index(); peer < world.size; peer += lanes.count()) {
      if (peer == world.rank) continue;
      const uint64_t* flag = world.flag(world.rank, peer, e);
      uint64_t word = load_acquire(flag);
      if (!has_reached(word, e)) {
        waiter.begin(e);
        do {
          ok = waiter.again(peer);
          word = load_acquire(flag);
        } while (ok && !has_reached(word, e));
      }
      if (ok && word != flag_word(e, signature)) ok = waiter.mismatch(peer);
      if (!ok) break;
    }
    return lanes.all(ok);
  }
};

}  // namespace pyparallel
