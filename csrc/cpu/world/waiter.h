// How a CPU rank waits: it spins for a few microseconds, then gives the core away, then looks every
// millisecond whether those it waits for still live. No wait outlasts the timeout.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/world.h"
#include "cpu/world/error.h"

namespace pyparallel::cpu {

// A state word: this rank takes part, has left, or has failed (its second word: the missing ranks).
enum class State : uint64_t { active = 0, left = 1, failed = 2 };

// What the language above does while a wait is long: let others run, take back control, see whether
// the user wants to stop. Any may be empty.
struct WaitHooks {
  std::function<void()> release;
  std::function<void()> acquire;
  std::function<bool()> interrupted;
};

class Waiter {
 public:
  using Clock = std::chrono::steady_clock;

  Waiter(const World& world, std::string group, std::vector<int> process_descriptors);
  ~Waiter();
  Waiter(const Waiter&) = delete;
  Waiter& operator=(const Waiter&) = delete;

  // Before and after a call: what errors are about; whether to run the hooks' release at once.
  void enter(const Description& doing, bool long_call);
  void leave();

  void begin(uint32_t epoch) { start(epoch, -1, nullptr, 0); }
  void begin_message(int peer, const uint64_t* word, uint64_t target) {
    start(0, peer, word, target);
  }
  bool again(int) {
    if (++turns_ > spin_turns_)
      slow_turn();
    else
      pause();
    return true;
  }
  // For a call that does not wait: gives up if what begin named has not come and never will.
  void look_once();
  [[noreturn]] bool mismatch(int peer);
  [[noreturn]] bool miscounted(int peer, int64_t expected, int64_t sent);
  [[noreturn]] bool unexpected(int peer, const Description& said, const Description& expected);

  double timeout_s = 300.0;
  // After this long the core is left idle between turns; the peer is busy with something else.
  double rest_after_s = 0.02;
  // Run in every turn of a longer wait: what this rank still has to do for its peers.
  std::function<void()> meanwhile;
  WaitHooks hooks;

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  void start(uint32_t epoch, int message_peer, const uint64_t* word, uint64_t target) {
    turns_ = 0;
    epoch_ = epoch;
    message_peer_ = message_peer;
    word_ = word;
    target_ = target;
  }
  void slow_turn();
  void look(Clock::time_point now);
  bool has_come(int peer) const;
  bool has_died(int peer) const;
  void run_release();
  [[noreturn]] void give_up(const std::string& reason, std::vector<int> missing);
  [[noreturn]] void differ(int peer, const std::string& here, const std::string& there);
  std::string prefix() const;

  const World& world_;
  std::string group_;
  // One for each rank; -1 for this rank and for ranks that are threads of this process.
  std::vector<int> process_descriptors_;
  int spin_turns_;

  const Description* doing_ = nullptr;
  uint32_t epoch_ = 0;
  int message_peer_ = -1;
  const uint64_t* word_ = nullptr;
  uint64_t target_ = 0;
  int turns_ = 0;
  bool released_ = false;
  Clock::time_point since_;
  Clock::time_point looked_;
  Clock::time_point asked_;
};

}  // namespace pyparallel::cpu
