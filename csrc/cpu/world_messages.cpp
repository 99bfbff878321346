// The point-to-point calls of a group.
#include "core/channel.h"
#include "cpu/world_call.h"

namespace pyparallel::cpu {

void Group::send(const void* data, int64_t n, DType dtype, int peer, int tag) {
  check_open();
  check_peer("dst", peer);
  const int64_t bytes = n * size_of(dtype);
  Description doing = description(Operation::message, dtype, n, Reduction::none, tag);
  doing.sequence = sent_[size_t(peer)] + 1;
  const auto* from = static_cast<const unsigned char*>(data);
  uint64_t& sent = sent_[size_t(peer)];
  const int64_t chunks = chunks_of<unsigned char>(world_, bytes);
  push_unsent();
  MemberOf member{world_, lanes_, waiter_, epoch_, 0, 0, Store::cached};
  int64_t next = 0;
  if (unsent_[size_t(peer)].empty()) {
    while (next < chunks && has_room(world_, peer, sent)) {
      send_chunk(member, from, bytes, next++, peer, doing, sent);
    }
  }
  if (next < chunks) {
    unsent_[size_t(peer)].push_back({doing, {from, from + bytes}, next});
    has_unsent_ = true;
  }
}

void Group::push_unsent() {
  if (!has_unsent_) return;
  MemberOf member{world_, lanes_, waiter_, epoch_, 0, 0, Store::cached};
  has_unsent_ = false;
  for (int peer = 0; peer < size(); ++peer) {
    auto& queue = unsent_[size_t(peer)];
    uint64_t& sent = sent_[size_t(peer)];
    while (!queue.empty() && has_room(world_, peer, sent)) {
      Unsent& first = queue.front();
      const int64_t bytes = int64_t(first.data.size());
      send_chunk(member, first.data.data(), bytes, first.next++, peer, first.said, sent);
      if (first.next == chunks_of<unsigned char>(world_, bytes)) queue.pop_front();
    }
    has_unsent_ = has_unsent_ || !queue.empty();
  }
}

void Group::flush() {
  push_unsent();
  for (int peer = 0; peer < size(); ++peer) {
    auto& queue = unsent_[size_t(peer)];
    while (!queue.empty()) {
      const Description doing = queue.front().said;
      MemberOf member{world_, lanes_, waiter_, epoch_, 0, 0, Store::cached};
      guard(doing, true, [&] {
        wait_count(member, world_.drained(world_.rank, peer), sent_[size_t(peer)] + 1 - kRing,
                   peer);
      });
      push_unsent();
    }
  }
}

void Group::receive(void* data, int64_t n, DType dtype, int peer, int tag) {
  check_open();
  check_peer("src", peer);
  const int64_t bytes = n * size_of(dtype);
  Description doing = description(Operation::message, dtype, n, Reduction::none, tag);
  doing.sequence = received_[size_t(peer)] + 1;
  push_unsent();
  MemberOf member{world_, lanes_, waiter_, epoch_, 0, 0, Store::cached};
  guard(doing, bytes > kLongBytes, [&] {
    pyparallel::receive(member, static_cast<unsigned char*>(data), bytes, peer, doing,
                        received_[size_t(peer)]);
  });
}

void Group::check_peer(const char* argument, int peer) const {
  if (peer < 0 || peer >= size() || peer == rank()) {
    throw std::invalid_argument(std::string(argument) + ": expected another rank of the group '" +
                                name_ + "', 0 to " + std::to_string(size() - 1) + " but not " +
                                std::to_string(rank()) + ", got " + std::to_string(peer));
  }
}

}  // namespace pyparallel::cpu
