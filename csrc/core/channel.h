// Point-to-point messages: a ring of kRing chunks for each ordered pair of ranks, in the sender's
// memory. The sender counts what it has filled, the receiver what it has drained; each count is
// released by its writer and acquired by the other, and both only grow.
//
// A chunk is a line of header, then data. A message of up to kRing chunks is sent without waiting
// for the receiver. Messages of a pair are received in the order sent; the receiver checks what the
// sender says it is against what it asked for.
#pragma once

#include "core/atomic.h"
#include "core/barrier.h"
#include "core/collective.h"
#include "core/world.h"

namespace pyparallel {

// Waits until the count at `word` has reached `target`; waiting for rank `peer`.
template <class M>
PP_HOST_DEVICE bool wait_count(M& m, const uint64_t* word, uint64_t target, int peer) {
  bool ok = true;
  if (m.lanes.index() == 0 && int64_t(load_acquire(word) - target) < 0) {
    m.waiter.begin_message(peer, word, target);
    do {
      ok = m.waiter.again(peer);
    } while (int64_t(load_acquire(word) - target) < 0 && ok);
  }
  return m.lanes.all(ok);
}

// Elements of T in a chunk, and chunks in a message of n.
template <class T>
PP_HOST_DEVICE int64_t chunk_elements(const World& w) {
  return line_elements<T>(w.ring_bytes - kLine);
}
template <class T>
PP_HOST_DEVICE int64_t chunks_of(const World& w, int64_t n) {
  return max_of(1, ceil_div(n, chunk_elements<T>(w)));
}

// Whether rank `peer` has drained enough for one more chunk; for the lane that asks.
PP_HOST_DEVICE bool has_room(const World& w, int peer, uint64_t filled) {
  return int64_t(load_acquire(w.drained(w.rank, peer)) - (filled + 1 - kRing)) >= 0;
}

// Chunk `s` of data [n] to rank `peer`, which must have room for it; `filled` counts the chunks sent
// to it so far, kept by the owner.
template <class T, class M>
PP_HOST_DEVICE void send_chunk(M& m, const T* data, int64_t n, int64_t s, int peer,
                               const Description& said, uint64_t& filled) {
  const World& w = m.world;
  unsigned char* chunk = w.ring(w.rank, peer, filled);
  const Part slice = slice_of({0, n}, chunk_elements<T>(w), s);
  if (m.lanes.index() == 0) *reinterpret_cast<Description*>(chunk) = said;
  m.lanes.copy(reinterpret_cast<T*>(chunk + kLine), data + slice.begin, slice.size(),
               Store::cached);
  m.lanes.sync();
  ++filled;
  if (m.lanes.index() == 0) store_release(w.filled(peer, w.rank), filled);
}

// data [n] to rank `peer`, waiting for room as often as it takes.
template <class T, class M>
PP_HOST_DEVICE bool send(M& m, const T* data, int64_t n, int peer, const Description& said,
                         uint64_t& filled) {
  const World& w = m.world;
  const int64_t chunks = chunks_of<T>(w, n);
  for (int64_t s = 0; s < chunks; ++s) {
    if (!wait_count(m, w.drained(w.rank, peer), filled + 1 - kRing, peer)) return false;
    send_chunk(m, data, n, s, peer, said, filled);
  }
  return true;
}

// The other side: data [n] from rank `peer`; `drained` counts the chunks taken from it so far.
template <class T, class M>
PP_HOST_DEVICE bool receive(M& m, T* data, int64_t n, int peer, const Description& expected,
                            uint64_t& drained) {
  const World& w = m.world;
  const int64_t size = chunk_elements<T>(w);
  const int64_t chunks = chunks_of<T>(w, n);
  for (int64_t s = 0; s < chunks; ++s) {
    if (!wait_count(m, w.filled(w.rank, peer), drained + 1, peer)) return false;
    const unsigned char* chunk = w.ring(peer, w.rank, drained);
    const auto& said = *reinterpret_cast<const Description*>(chunk);
    bool agreed = true;
    if (m.lanes.index() == 0 && signature_of(said) != signature_of(expected)) {
      agreed = m.waiter.unexpected(peer, said, expected);
    }
    if (!m.lanes.all(agreed)) return false;
    const Part slice = slice_of({0, n}, size, s);
    m.lanes.copy(data + slice.begin, reinterpret_cast<const T*>(chunk + kLine), slice.size(),
                 Store::cached);
    m.lanes.sync();
    ++drained;
    if (m.lanes.index() == 0) store_release(w.drained(peer, w.rank), drained);
  }
  return true;
}

}  // namespace pyparallel
