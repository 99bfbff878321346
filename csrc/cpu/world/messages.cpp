// The point-to-point calls of a group.
#include <chrono>

#include "core/channel.h"
#include "cpu/world/call.h"

namespace pyparallel::cpu {

void Group::send(const void* data, int64_t n, DType dtype, int peer, int tag) {
  check_open();
  check_peer("dst", peer);
  const int64_t bytes = n * size_of(dtype);
  Description doing = description(Operation::message, dtype, n, Reduction::none, tag);
  const auto* from = static_cast<const unsigned char*>(data);
  const int64_t chunks = chunks_of<unsigned char>(world_, bytes);
  push_unsent();
  const std::lock_guard lock(sending_);
  uint64_t& sent = sent_[size_t(peer)];
  doing.sequence = sent + 1;
  MemberOf member{world_, lanes_, waiter_, epoch_, 0, 0, Store::cached};
  int64_t next = 0;
  if (unsent_[size_t(peer)].empty()) {
    while (next < chunks && has_room(world_, peer, sent)) {
      send_chunk(member, from, bytes, next++, peer, doing, sent);
    }
  }
  if (next < chunks) {
    // A peer that has gone makes no room; what is meant for it must not pile up.
    guard(doing, false, [&] {
      waiter_.begin_message(peer, world_.drained(world_.rank, peer), sent + 1 - kRing);
      waiter_.look_once();
    });
    unsent_[size_t(peer)].push_back({doing, {from, from + bytes}, next});
    has_unsent_ = true;
    if (!pusher_.joinable()) pusher_ = std::thread([this] { push_in_background(); });
    unsent_there_.notify_one();
  }
}

void Group::push_unsent() {
  if (!has_unsent_) return;
  const std::lock_guard lock(sending_);
  MemberOf member{world_, lanes_, waiter_, epoch_, 0, 0, Store::cached};
  bool left = false;
  for (int peer = 0; peer < size(); ++peer) {
    auto& queue = unsent_[size_t(peer)];
    uint64_t& sent = sent_[size_t(peer)];
    while (!queue.empty() && has_room(world_, peer, sent)) {
      Unsent& first = queue.front();
      const int64_t bytes = int64_t(first.data.size());
      send_chunk(member, first.data.data(), bytes, first.next++, peer, first.said, sent);
      if (first.next == chunks_of<unsigned char>(world_, bytes)) queue.pop_front();
    }
    left = left || !queue.empty();
  }
  has_unsent_ = left;
}

void Group::push_in_background() {
  // Often enough that a long message moves at a good part of memory speed, seldom enough that a
  // rank that is at work does not feel it.
  constexpr auto kPushEvery = std::chrono::microseconds(100);
  std::unique_lock lock(sending_);
  while (!stop_pushing_) {
    if (!has_unsent_) {
      unsent_there_.wait(lock);
      continue;
    }
    lock.unlock();
    push_unsent();
    std::this_thread::sleep_for(kPushEvery);
    lock.lock();
  }
}

void Group::flush() {
  push_unsent();
  for (int peer = 0; peer < size(); ++peer) {
    while (true) {
      Description doing;
      uint64_t target;
      {
        const std::lock_guard lock(sending_);
        if (unsent_[size_t(peer)].empty()) break;
        doing = unsent_[size_t(peer)].front().said;
        target = sent_[size_t(peer)] + 1 - kRing;
      }
      MemberOf member{world_, lanes_, waiter_, epoch_, 0, 0, Store::cached};
      guard(doing, true,
            [&] { wait_count(member, world_.drained(world_.rank, peer), target, peer); });
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
