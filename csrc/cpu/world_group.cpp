#include "cpu/world_group.h"

#include <unistd.h>

#include <utility>

#include "core/atomic.h"
#include "core/channel.h"
#include "core/collective.h"
#include "cpu/collectives_plan.h"

namespace pyparallel::cpu {
namespace {

constexpr int64_t kPage = 4096;
// Calls that move more than this let other threads of the interpreter run meanwhile.
constexpr int64_t kLongBytes = int64_t(256) << 10;

int64_t rank_bytes(int size) {
  return round_up(World::control_bytes(size), kPage) + World::data_bytes(kSlotBytes) +
         World::channel_bytes(size, kRingBytes);
}

int checked_size(int rank, int size) {
  if (size < 1 || size > kMaxRanks) {
    throw std::invalid_argument("size: expected 1 to " + std::to_string(kMaxRanks) +
                                " ranks, got " + std::to_string(size) +
                                "; use torch.distributed for larger groups");
  }
  if (rank < 0 || rank >= size) {
    throw std::invalid_argument("rank: expected 0 to " + std::to_string(size - 1) + ", got " +
                                std::to_string(rank));
  }
  return size;
}

World world_over(unsigned char* base, int rank, int size) {
  World world{};
  world.rank = rank;
  world.size = size;
  world.slot_bytes = kSlotBytes;
  world.ring_bytes = kRingBytes;
  for (int r = 0; r < size; ++r) {
    unsigned char* segment = base + r * rank_bytes(size);
    world.control[r] = segment;
    world.data[r] = segment + round_up(World::control_bytes(size), kPage);
    world.channel[r] = world.data[r] + World::data_bytes(kSlotBytes);
  }
  return world;
}

Split in_bytes(const Split& split, int size, int64_t element) {
  Split bytes;
  for (int r = 0; r <= size; ++r) bytes.begin[r] = split.begin[r] * element;
  return bytes;
}

uint64_t hash_of(const Split& split, int size) {
  uint64_t hash = 0;
  for (int r = 1; r <= size; ++r) hash = (hash ^ uint64_t(split.begin[r])) * 0x9e3779b97f4a7c15u;
  return hash;
}

Description description(Operation operation, DType dtype, int64_t count,
                        Reduction reduction = Reduction::none, int root = 0, uint64_t split = 0) {
  return {uint32_t(operation), uint32_t(dtype), uint32_t(reduction), root, count, split, 0, 0};
}

}  // namespace

int64_t Group::shared_bytes(int size) { return size * rank_bytes(size); }

Group::Group(std::string name, int rank, int size, int memory_descriptor,
             std::vector<int> process_descriptors, std::shared_ptr<Mapping> mapping)
    : name_(std::move(name)),
      descriptor_(memory_descriptor),
      owner_(getpid()),
      mapping_(mapping ? std::move(mapping)
                       : std::make_shared<Mapping>(memory_descriptor, 0,
                                                   shared_bytes(checked_size(rank, size)))),
      world_(world_over(mapping_->data(), rank, size)),
      waiter_(world_, name_, std::move(process_descriptors)),
      file_bytes_(shared_bytes(size)),
      unsent_(size_t(size)),
      sent_(size_t(size)),
      received_(size_t(size)) {
  waiter_.meanwhile = [this] { push_unsent(); };
}

Group::~Group() { close(); }

void Group::close() {
  if (descriptor_ < 0) return;
  if (getpid() == owner_ && load_relaxed(world_.state(world_.rank)) == uint64_t(State::active)) {
    store_release(world_.state(world_.rank), uint64_t(State::left));
  }
  ::close(std::exchange(descriptor_, -1));
}

void Group::check_open() const {
  if (failure_) throw *failure_;
  if (descriptor_ < 0) {
    throw PeerError("the group '" + name_ + "' is closed", "", sequence_, name_, {});
  }
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

void Group::barrier() {
  call(description(Operation::barrier, DType::uint8, 0), kSlotBytes, false,
       [&](MemberOf& m) { pyparallel::barrier(m); });
}

void Group::all_reduce(void* data, int64_t n, DType dtype, Reduction reduction) {
  const int64_t bytes = n * size_of(dtype);
  const Plan plan = plan_of(Operation::all_reduce, bytes, size());
  visit_reducible(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* typed = static_cast<T*>(data);
    const auto run = [&](auto op) {
      using Op = decltype(op);
      call(description(Operation::all_reduce, dtype, n, reduction), plan.slice_bytes,
           bytes > kLongBytes, [&](MemberOf& m) {
             if (plan.one_shot) one_shot_all_reduce<Op>(m, typed, n);
             else two_shot_all_reduce<Op>(m, typed, n);
           });
    };
    switch (reduction) {
      case Reduction::max: return run(Max{});
      case Reduction::min: return run(Min{});
      default: return run(Sum{});
    }
  });
}

void Group::reduce_scatter(void* output, const void* input, const Split& split, DType dtype,
                           Reduction reduction) {
  const int64_t n = split.begin[size()];
  const int64_t bytes = n * size_of(dtype);
  const Plan plan = plan_of(Operation::reduce_scatter, bytes, size());
  visit_reducible(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto op) {
      using Op = decltype(op);
      call(description(Operation::reduce_scatter, dtype, n, reduction, 0, hash_of(split, size())),
           plan.slice_bytes, bytes > kLongBytes, [&](MemberOf& m) {
             m.store = plan.store;
             pyparallel::reduce_scatter<Op>(m, static_cast<T*>(output),
                                            static_cast<const T*>(input), split);
           });
    };
    switch (reduction) {
      case Reduction::max: return run(Max{});
      case Reduction::min: return run(Min{});
      default: return run(Sum{});
    }
  });
}

void Group::all_gather(void* output, const void* input, const Split& split, DType dtype) {
  const int64_t n = split.begin[size()];
  const int64_t bytes = n * size_of(dtype);
  const Plan plan = plan_of(Operation::all_gather, bytes, size());
  call(description(Operation::all_gather, dtype, n, Reduction::none, 0, hash_of(split, size())),
       plan.slice_bytes, bytes > kLongBytes, [&](MemberOf& m) {
         m.store = plan.store;
         pyparallel::all_gather(m, static_cast<unsigned char*>(output),
                                static_cast<const unsigned char*>(input),
                                in_bytes(split, size(), size_of(dtype)));
       });
}

void Group::all_to_all(void* output, const void* input, const Split& output_split,
                       const Split& input_split, DType dtype) {
  const int64_t element = size_of(dtype);
  const int64_t bytes = max_of(output_split.begin[size()], input_split.begin[size()]) * element;
  // Sizes differ by rank, so nothing that depends on them may be part of what all agree on.
  const Plan plan = plan_of(Operation::all_to_all, 0, size());
  call(description(Operation::all_to_all, dtype, 0), plan.slice_bytes, bytes > kLongBytes,
       [&](MemberOf& m) {
         m.store = plan_of(Operation::all_to_all, bytes, size()).store;
         pyparallel::all_to_all(m, static_cast<unsigned char*>(output),
                                static_cast<const unsigned char*>(input),
                                in_bytes(output_split, size(), element),
                                in_bytes(input_split, size(), element));
       });
}

void Group::broadcast(void* data, int64_t n, DType dtype, int root) {
  const int64_t bytes = n * size_of(dtype);
  const Plan plan = plan_of(Operation::broadcast, bytes, size());
  call(description(Operation::broadcast, dtype, n, Reduction::none, root), plan.slice_bytes,
       bytes > kLongBytes, [&](MemberOf& m) {
         m.store = plan.store;
         pyparallel::broadcast(m, static_cast<unsigned char*>(data), bytes, root);
       });
}

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

void Group::exchange(int64_t count, DType dtype) {
  call(description(Operation::exchange, dtype, count), kSlotBytes, false,
       [&](MemberOf& m) { pyparallel::barrier(m); });
}

void Group::announce(int64_t count, DType dtype) {
  check_open();
  push_unsent();
  announced_ = description(Operation::exchange, dtype, count);
  announced_.sequence = ++sequence_;
  *world_.header(world_.rank) = announced_;
  MemberOf member{world_, lanes_, waiter_, epoch_, signature_of(announced_), kSlotBytes, Store::cached};
  member.signal(epoch_ + 1);
}

void Group::await() {
  check_open();
  MemberOf member{world_, lanes_, waiter_, epoch_, signature_of(announced_), kSlotBytes, Store::cached};
  guard(announced_, false, [&] { member.wait(epoch_ + 1); });
  ++epoch_;
}

std::unique_ptr<Window> Group::window(int64_t bytes) {
  const int64_t stride = round_up(max_of(bytes, 1), kPage);
  call(description(Operation::window, DType::uint8, bytes), kSlotBytes, true,
       [&](MemberOf& m) { pyparallel::barrier(m); });
  const int64_t offset = std::exchange(file_bytes_, file_bytes_ + stride * size());
  grow_shared_memory(descriptor_, file_bytes_);
  return std::make_unique<Window>(Mapping(descriptor_, offset, stride * size()), stride);
}

}  // namespace pyparallel::cpu
