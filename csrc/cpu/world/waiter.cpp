#include "cpu/world/waiter.h"

#include <poll.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "core/atomic.h"
#include "core/barrier.h"
#include "cpu/world/types.h"

namespace pyparallel::cpu {
namespace {

using std::chrono::duration;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// About 4 us of pauses, several times what a flag needs from core to core. Then every turn offers the
// core to others: one system call of 0.3 us if nobody wants it, and the way on if the peer does.
constexpr int kSpinTurns = 64;
constexpr auto kLookEvery = milliseconds(1);
constexpr auto kAskEvery = milliseconds(50);
constexpr auto kRest = microseconds(50);

int core_count() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

std::string ranks_text(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(ranks[i]);
  return text;
}

}  // namespace

Waiter::Waiter(const World& world, std::string group, std::vector<int> process_descriptors)
    : world_(world),
      group_(std::move(group)),
      process_descriptors_(std::move(process_descriptors)),
      // With more ranks than cores, the one waited for may need this very core.
      spin_turns_(world.size <= core_count() ? kSpinTurns : 0) {}

Waiter::~Waiter() {
  for (int descriptor : process_descriptors_) {
    if (descriptor >= 0) close(descriptor);
  }
}

void Waiter::enter(const Description& doing, bool long_call) {
  doing_ = &doing;
  if (long_call) run_release();
}

void Waiter::leave() {
  if (released_) {
    released_ = false;
    if (hooks.acquire) hooks.acquire();
  }
}

void Waiter::run_release() {
  if (released_ || !hooks.release) return;
  hooks.release();
  released_ = true;
}

void Waiter::slow_turn() {
  if (meanwhile) meanwhile();
  const auto now = Clock::now();
  if (turns_ == spin_turns_ + 1) {
    since_ = looked_ = asked_ = now;
  } else if (now - looked_ >= kLookEvery) {
    run_release();
    looked_ = now;
    look(now);
  }
  if (duration<double>(now - since_).count() < rest_after_s) {
    sched_yield();
  } else {
    const timespec rest{0, std::chrono::nanoseconds(kRest).count()};
    nanosleep(&rest, nullptr);
  }
}

void Waiter::look_once() {
  since_ = asked_ = Clock::now();
  look(since_);
}

bool Waiter::has_come(int peer) const {
  if (message_peer_ >= 0) {
    return peer != message_peer_ || int64_t(load_acquire(word_) - target_) >= 0;
  }
  return peer == world_.rank ||
         has_reached(load_acquire(world_.flag(world_.rank, peer, epoch_)), epoch_);
}

bool Waiter::has_died(int peer) const {
  const int descriptor = process_descriptors_[size_t(peer)];
  if (descriptor < 0) return false;
  // A process descriptor becomes readable when the process ends, also while nobody has reaped it.
  pollfd request{descriptor, POLLIN, 0};
  return poll(&request, 1, 0) > 0;
}

void Waiter::look(Clock::time_point now) {
  std::vector<int> dead;
  std::vector<int> left;
  std::vector<int> late;
  std::vector<int> lost_by_peers;
  int failed_peer = -1;
  for (int peer = 0; peer < world_.size; ++peer) {
    // A peer may come, then end: so first whether it has ended, then whether it had come.
    const bool died = peer != world_.rank && has_died(peer);
    const auto state = State(load_acquire(world_.state(peer)));
    if (has_come(peer)) continue;
    late.push_back(peer);
    if (state == State::left) {
      left.push_back(peer);
    } else if (died) {
      dead.push_back(peer);
    } else if (state == State::failed && failed_peer < 0) {
      failed_peer = peer;
      const uint64_t mask = load_relaxed(world_.state(peer) + 1);
      for (int r = 0; r < world_.size; ++r) {
        if (mask >> r & 1) lost_by_peers.push_back(r);
      }
    }
  }
  if (late.empty()) return;
  if (!dead.empty()) give_up(ranks_text(dead) + " died", dead);
  if (!left.empty()) give_up(ranks_text(left) + " left the group", left);
  if (failed_peer >= 0) {
    give_up("rank " + std::to_string(failed_peer) + " gave up" +
                (lost_by_peers.empty() ? "" : " waiting for " + ranks_text(lost_by_peers)),
            lost_by_peers);
  }
  const double waited = duration<double>(now - since_).count();
  if (waited >= timeout_s) {
    give_up("no sign of " + ranks_text(late) + " within " + std::to_string(timeout_s).substr(0, 6) +
                " s (alive, but stuck or elsewhere)",
            late);
  }
  if (hooks.interrupted && now - asked_ >= kAskEvery) {
    asked_ = now;
    if (hooks.interrupted()) {
      store_release(world_.state(world_.rank), uint64_t(State::failed));
      throw Interrupted(prefix() + "interrupted by a signal");
    }
  }
}

std::string Waiter::prefix() const {
  return std::string(name_of(Operation(doing_->operation))) + " #" +
         std::to_string(doing_->sequence) + " on group '" + group_ + "' (rank " +
         std::to_string(world_.rank) + " of " + std::to_string(world_.size) + "): ";
}

void Waiter::give_up(const std::string& reason, std::vector<int> missing) {
  uint64_t mask = 0;
  for (int rank : missing) mask |= uint64_t(1) << rank;
  __atomic_store_n(world_.state(world_.rank) + 1, mask, __ATOMIC_RELAXED);
  store_release(world_.state(world_.rank), uint64_t(State::failed));
  throw PeerError(prefix() + reason, name_of(Operation(doing_->operation)), doing_->sequence,
                  group_, std::move(missing));
}

void Waiter::differ(int peer, const std::string& here, const std::string& there) {
  give_up("rank " + std::to_string(world_.rank) + " calls " + here + ", but rank " +
              std::to_string(peer) + " calls " + there +
              "; all ranks must make the same calls in the same order",
          {});
}

bool Waiter::mismatch(int peer) {
  const Description& said = *world_.header(peer);
  std::string here = to_string(*doing_);
  std::string there = to_string(said);
  if (here == there) {
    here += " in parts " + std::to_string(doing_->split);
    there += " in other parts " + std::to_string(said.split);
  }
  differ(peer, here, there);
}

bool Waiter::miscounted(int peer, int64_t expected, int64_t sent) {
  const int64_t size = size_of(DType(doing_->dtype));
  give_up("rank " + std::to_string(world_.rank) + " expects " + std::to_string(expected / size) +
              " elements from rank " + std::to_string(peer) + ", but rank " + std::to_string(peer) +
              " sends " + std::to_string(sent / size) + "; check output_counts and input_counts",
          {});
}

bool Waiter::unexpected(int peer, const Description& said, const Description& expected) {
  give_up("rank " + std::to_string(world_.rank) + " waits for a " + to_string(expected) +
              ", but rank " + std::to_string(peer) + " sent a " + to_string(said),
          {});
}

}  // namespace pyparallel::cpu
