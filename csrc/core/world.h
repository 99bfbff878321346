// Every rank's address of one buffer, as this rank sees it: the whole of what a collective knows
// about the memory it runs on. A plain struct, passed to a GPU kernel by value.
//
// A block (a GPU thread block, or the one worker of a CPU rank) owns a control area and a data area
// in the segment of every rank, and block i of one rank talks to block i of the others only. So a
// World is one block's view, and blocks never wait for each other.
//
//   control area of rank r   state | header | flag[2][writer] | filled[writer] | drained[reader]
//   data area of rank r      slot[4], used in turn by epoch; only rank r writes them
//   channel area of rank r   ring[reader][kRing], the point-to-point messages rank r sends
//
// Words that different ranks write are a line apart. All of it starts as zeros.
#pragma once

#include <cstdint>

#include "core/part.h"

namespace pyparallel {

// Two lines of 64 bytes, since adjacent lines are prefetched in pairs.
constexpr int64_t kLine = 128;
// Flags alternate: a peer may be one epoch ahead, never two (barrier.h).
constexpr uint32_t kFlagSlots = 2;
// Slots rotate: epochs e - 1, e and e + 1 may be in use at once (collective.h), four for the mask.
constexpr uint32_t kDataSlots = 4;
constexpr uint64_t kRing = 4;

// What a rank says it is doing, so that a peer that does something else can name both.
struct Description {
  uint32_t operation;
  uint32_t dtype;
  uint32_t reduction;
  int32_t root;
  int64_t count;
  uint64_t split;
  uint64_t sequence;
  uint64_t reserved;
};
static_assert(sizeof(Description) == 48, "a description is part of the shared layout");

struct World {
  int rank;
  int size;
  // Bytes of one slot and of one message of a channel's ring; multiples of kLine.
  int64_t slot_bytes;
  int64_t ring_bytes;
  unsigned char* control[kMaxRanks];
  unsigned char* data[kMaxRanks];
  unsigned char* channel[kMaxRanks];

  static PP_HOST_DEVICE int64_t control_bytes(int size) {
    return kLine * (2 + int64_t(size) * (kFlagSlots + 2));
  }
  static PP_HOST_DEVICE int64_t data_bytes(int64_t slot_bytes) { return kDataSlots * slot_bytes; }
  static PP_HOST_DEVICE int64_t channel_bytes(int size, int64_t ring_bytes) {
    return int64_t(size) * int64_t(kRing) * ring_bytes;
  }

  PP_HOST_DEVICE uint64_t* word(int owner, int64_t line) const {
    return reinterpret_cast<uint64_t*>(control[owner] + line * kLine);
  }
  // Rank `owner`'s own state: 0 while it takes part. The rest of the line is the backend's.
  PP_HOST_DEVICE uint64_t* state(int owner) const { return word(owner, 0); }
  // What `owner` is doing. One is enough: no rank leaves an epoch in which two signatures differ.
  PP_HOST_DEVICE Description* header(int owner) const {
    return reinterpret_cast<Description*>(word(owner, 1));
  }
  // Set by `writer`, polled by `owner` in its own memory.
  PP_HOST_DEVICE uint64_t* flag(int owner, int writer, uint32_t epoch) const {
    return word(owner, 2 + int64_t(epoch % kFlagSlots) * size + writer);
  }
  // Messages `writer` has put into its ring for `owner`; set by `writer`.
  PP_HOST_DEVICE uint64_t* filled(int owner, int writer) const {
    return word(owner, 2 + int64_t(kFlagSlots) * size + writer);
  }
  // Messages `reader` has taken out of `owner`'s ring; set by `reader`.
  PP_HOST_DEVICE uint64_t* drained(int owner, int reader) const {
    return word(owner, 2 + int64_t(kFlagSlots + 1) * size + reader);
  }
  PP_HOST_DEVICE unsigned char* slot(int owner, uint32_t epoch) const {
    return data[owner] + int64_t(epoch % kDataSlots) * slot_bytes;
  }
  PP_HOST_DEVICE unsigned char* ring(int writer, int reader, uint64_t message) const {
    const int64_t chunk = int64_t(reader) * int64_t(kRing) + int64_t(message % kRing);
    return channel[writer] + chunk * ring_bytes;
  }
};

}  // namespace pyparallel
