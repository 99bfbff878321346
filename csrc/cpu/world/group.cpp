#include "cpu/world/group.h"

#include <unistd.h>

#include <utility>

#include "core/atomic.h"
#include "core/collective.h"
#include "cpu/world/call.h"
#include "cpu/world/plan.h"

namespace pyparallel::cpu {
namespace {

constexpr int64_t kPage = 4096;

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
  if (getpid() != owner_) {
    // After a fork the thread is the parent's; here there is none to join.
    if (pusher_.joinable()) pusher_.detach();
  } else if (pusher_.joinable()) {
    {
      const std::lock_guard lock(sending_);
      stop_pushing_ = true;
    }
    unsent_there_.notify_one();
    pusher_.join();
  }
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
  MemberOf member{world_,     lanes_,       waiter_, epoch_, signature_of(announced_),
                  kSlotBytes, Store::cached};
  member.signal(epoch_ + 1);
}

void Group::await() {
  check_open();
  MemberOf member{world_,     lanes_,       waiter_, epoch_, signature_of(announced_),
                  kSlotBytes, Store::cached};
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
