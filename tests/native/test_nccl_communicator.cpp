// The NCCL communicator against a scripted NCCL: creation without blocking, bounded waits, aborts, what is
// registered and given back. Under ThreadSanitizer, with a second thread that polls.
#include "cuda/nccl/communicator.h"

#include <chrono>
#include <functional>
#include <thread>

#include "check.h"
#include "fake_nccl.h"

using pyparallel::cuda::NcclCommunicator;
using pyparallel::cuda::PeerError;
using pyparallel::test::expect;
namespace test = pyparallel::test;

namespace {

std::unique_ptr<NcclCommunicator> made(double timeout = 5.0) {
  fake::reset();
  return std::make_unique<NcclCommunicator>("g", NcclCommunicator::unique_id(), 0, 2, timeout);
}

PeerError error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const PeerError& error) {
    return error;
  }
  test::fail("expected a PeerError");
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void all_reduce(NcclCommunicator& c) { c.all_reduce(0, 0, 4, 7, 0, nullptr); }

void creation() {
  fake::reset();
  fake::script().polls_in_progress = 3;
  NcclCommunicator c("g", NcclCommunicator::unique_id(), 0, 2, 5.0);
  expect(fake::script().blocking == 0, "non-blocking");
  expect(fake::script().priority == -5, "the stream has the highest priority");
  c.close();
  expect(fake::count("finalize") == 1 && fake::count("destroy") == 1, "closed once");
  expect(has(error_of([&] { all_reduce(c); }).what(), "the group 'g' is closed"), "closed");
}

void creation_is_bounded() {
  fake::reset();
  fake::script().polls_in_progress = 1 << 30;
  const auto started = std::chrono::steady_clock::now();
  const PeerError error =
      error_of([] { NcclCommunicator c("g", NcclCommunicator::unique_id(), 0, 2, 0.2); });
  expect(has(error.what(), "init #0 of group 'g' (rank 0 of 2): not all ranks came"), error.what());
  expect(fake::count("abort") == 1, "aborted");
  expect(std::chrono::steady_clock::now() - started < std::chrono::seconds(3), "in time");
}

void an_error_of_nccl_is_found_by_the_poll() {
  auto c = made();
  all_reduce(*c);
  fake::script().outcome = ncclRemoteError;
  error_of([&] { c->poll(); });
  expect(fake::count("abort") == 1, "aborted");
  const PeerError later = error_of([&] { all_reduce(*c); });
  expect(has(later.what(), "all_reduce #1") && has(later.what(), "fake detail"), later.what());
  expect(fake::count("all_reduce") == 1, "nothing more is enqueued");
}

void an_overdue_call_is_named() {
  auto c = made(0.1);
  fake::script().event_done = false;
  c->all_gather(0, 0, 4, 7, nullptr);
  all_reduce(*c);
  c->poll();
  std::this_thread::sleep_for(std::chrono::milliseconds(150));
  const PeerError error = error_of([&] { c->poll(); });
  expect(error.operation == "all_gather" && error.sequence == 1, error.what());
  expect(fake::count("abort") == 1, "aborted once");
}

void a_known_death_ends_a_wait() {
  auto c = made(30.0);
  fake::script().event_done = false;
  all_reduce(*c);
  std::thread watcher([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    c->fail("died: rank 1", {1});
  });
  const PeerError error = error_of([&] { c->synchronize(nullptr); });
  watcher.join();
  expect(error.missing == std::vector<int>{1} && has(error.what(), "died: rank 1"), error.what());
}

void polling_beside_calls() {
  auto c = made();
  std::atomic<bool> done{false};
  std::thread poller([&] {
    while (!done) c->poll();
  });
  for (int i = 0; i < 200; ++i) all_reduce(*c);
  done = true;
  poller.join();
  expect(fake::count("all_reduce") == 200 && fake::count("event") < 200, "events are used again");
}

void groups_are_ended_after_an_error() {
  auto c = made();
  fake::script().refusals["send"] = ncclInvalidArgument;
  bool refused = false;
  try {
    c->exchange({{8, 1, 1}}, {{16, 1, 1}, {24, 0, 1}}, 1, nullptr, "exchange");
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(refused && fake::count("group_start") == 1 && fake::count("group_end") == 1, "ended");
  expect(fake::count("recv") == 1, "an empty message is not sent");
}

void sub_groups() {
  auto c = made();
  expect(c->split(-1, 0, "none") == nullptr, "no color, no group");
  const auto child = c->split(0, 0, "half");
  expect(child->rank() == 1 && child->size() == 2 && child->name() == "half", "the child");
  // As NCCL 2.32 does: success at once, the handle later.
  fake::script().late_child_ms = 20;
  const auto late = c->split(0, 0, "late");
  expect(late->rank() == 1 && late->size() == 2, "a child whose handle comes late");
  fake::script().late_child_ms = 0;
}

void captured_calls_have_no_deadline() {
  auto c = made();
  fake::script().capturing = true;
  all_reduce(*c);
  expect(fake::count("record") == 0, "no event inside a capture");
}

void windows() {
  auto c = made();
  const auto [first, address] = c->allocate_window(4096);
  const auto [second, other] = c->allocate_window(8192);
  expect(first != 0 && second != 0 && first != second && address != 0 && other != address, "two");
  expect(fake::count("window_register") == 2 && fake::count("register") == 2, "both registered");
  c->free_window(first);
  c->free_window(first);
  expect(fake::count("window_deregister") == 1 && fake::count("deregister") == 1,
         "given back once");
  expect(fake::count("mem_free") == 1, "and freed");
  c->close();
  expect(fake::count("window_deregister") == 2 && fake::count("mem_free") == 2,
         "the rest at the end");
  expect(fake::position("finalize") > fake::position("mem_free"), "before the communicator ends");
}

void windows_that_are_refused() {
  for (const bool null : {false, true}) {
    auto c = made();
    fake::script().window_is_null = null;
    if (!null) fake::script().refusals["window_register"] = ncclInvalidUsage;
    expect(c->allocate_window(4096).first == 0, "no window");
    expect(fake::count("mem_free") == 1 && fake::count("abort") == 0,
           "no memory kept, no harm done");
    all_reduce(*c);
  }
  auto c = made();
  fake::script().refusals["register"] = ncclInvalidUsage;
  expect(c->allocate_window(4096).first != 0, "a window without a user buffer");
  c->close();
  expect(fake::count("deregister") == 0 && fake::count("window_deregister") == 1,
         "only the window");
}

void windows_of_an_aborted_communicator() {
  auto c = made();
  expect(c->allocate_window(4096).first != 0, "a window");
  c->fail("died: rank 1", {1});
  c.reset();
  expect(fake::count("window_deregister") == 0 && fake::count("mem_free") == 1, "memory is freed");
}

}  // namespace

int main() {
  const std::pair<const char*, void (*)()> tests[] = {
      {"creation", creation},
      {"creation_is_bounded", creation_is_bounded},
      {"an_error_of_nccl_is_found_by_the_poll", an_error_of_nccl_is_found_by_the_poll},
      {"an_overdue_call_is_named", an_overdue_call_is_named},
      {"a_known_death_ends_a_wait", a_known_death_ends_a_wait},
      {"polling_beside_calls", polling_beside_calls},
      {"groups_are_ended_after_an_error", groups_are_ended_after_an_error},
      {"sub_groups", sub_groups},
      {"captured_calls_have_no_deadline", captured_calls_have_no_deadline},
      {"windows", windows},
      {"windows_that_are_refused", windows_that_are_refused},
      {"windows_of_an_aborted_communicator", windows_of_an_aborted_communicator},
  };
  for (const auto& [name, run] : tests) {
    run();
    std::printf("%s\n", name);
  }
}
