// The collectives of csrc/core themselves, on plain lanes: every algorithm, many epochs, slices far
// smaller than the data, ranks delayed at random, and a fold that depends on the order of the ranks.
#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/channel.h"
#include "core/collective.h"

namespace pyparallel::test {
namespace {

// Neither commutative nor associative: any other order, or a value read too early, changes it.
struct Append {
  template <class A>
  static A apply(A a, A b) {
    return a * 31 + b;
  }
};

struct SpinningWaiter {
  void begin(uint32_t) {}
  void begin_message(int, const uint64_t*, uint64_t) {}
  bool again(int) {
    std::this_thread::yield();
    return true;
  }
  bool mismatch(int peer) { fail("mismatch with rank " + std::to_string(peer)); }
  bool miscounted(int peer, int64_t, int64_t) { fail("miscounted by " + std::to_string(peer)); }
  bool unexpected(int peer, const Description&, const Description&) {
    fail("unexpected from " + std::to_string(peer));
  }
};

constexpr int64_t kSlotBytes = 4096;
constexpr int64_t kRingBytes = 1024;

using MemberOf = Member<SingleLane, SpinningWaiter>;

// The memory of all ranks, on the heap.
struct Segments {
  explicit Segments(int size)
      : size(size),
        stride(World::control_bytes(size) + World::data_bytes(kSlotBytes) +
               World::channel_bytes(size, kRingBytes)),
        memory(size_t(size * stride / 8 + 16)) {}

  World world(int rank) {
    World w{};
    w.rank = rank;
    w.size = size;
    w.slot_bytes = kSlotBytes;
    w.ring_bytes = kRingBytes;
    auto* base = reinterpret_cast<unsigned char*>(
        round_up(int64_t(reinterpret_cast<uintptr_t>(memory.data())), kLine));
    for (int r = 0; r < size; ++r) {
      w.control[r] = base + r * stride;
      w.data[r] = w.control[r] + World::control_bytes(size);
      w.channel[r] = w.data[r] + World::data_bytes(kSlotBytes);
    }
    return w;
  }

  // As if that many epochs had gone by: a word of 0 would be ahead of an epoch shortly before 2^32.
  void set_epoch(uint32_t epoch) {
    const World w = world(0);
    for (int owner = 0; owner < size; ++owner) {
      for (int writer = 0; writer < size; ++writer) {
        *w.flag(owner, writer, 0) = *w.flag(owner, writer, 1) = flag_word(epoch, 0);
      }
    }
  }

  int size;
  int64_t stride;
  std::vector<uint64_t> memory;
};

// Element i of what rank r puts into round k.
int64_t value(int r, int64_t k, int64_t i) { return (r + 1) * 1000003 + k * 7919 + i; }

std::vector<int64_t> filled(int r, int64_t k, int64_t n) {
  std::vector<int64_t> data(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) data[size_t(i)] = value(r, k, i);
  return data;
}

int64_t folded(int size, int64_t k, int64_t i) {
  int64_t total = value(0, k, i);
  for (int r = 1; r < size; ++r) total = Append::apply(total, value(r, k, i));
  return total;
}

Split random_split(Random& random, int64_t n, int size) {
  std::vector<int64_t> cuts{0, n};
  while (int(cuts.size()) <= size) cuts.push_back(random.below(n + 1));
  std::sort(cuts.begin(), cuts.end());
  Split split{};
  for (int r = 0; r <= size; ++r) split.begin[r] = cuts[size_t(r)];
  return split;
}

void check(const std::vector<int64_t>& data, int size, int64_t k, Part part, const char* what) {
  for (int64_t i = 0; i < part.size(); ++i) {
    expect(data[size_t(i)] == folded(size, k, part.begin + i), what);
  }
}

void one_round(MemberOf& m, Random& random, int64_t k) {
  const int size = m.world.size;
  const int rank = m.world.rank;
  const int64_t n = random.below(random.below(3) == 0 ? 5 : 4000);
  const int64_t choice = random.below(8);
  m.signature = uint32_t(choice);
  m.slice_bytes = random.below(2) == 0 ? kSlotBytes : kSlotBytes / 2;
  if (int64_t(random.next() % 7) == k % 7 && rank == int(k % size)) std::this_thread::yield();
  std::vector<int64_t> data = filled(rank, k, n);
  if (choice == 0) {
    one_shot_all_reduce<Append>(m, data.data(), n);
    check(data, size, k, {0, n}, "one_shot_all_reduce");
  } else if (choice == 1) {
    two_shot_all_reduce<Append>(m, data.data(), n);
    check(data, size, k, {0, n}, "two_shot_all_reduce");
  } else if (choice == 2) {
    const Split split = random_split(random, n, size);
    std::vector<int64_t> out(size_t(split[rank].size()));
    reduce_scatter<Append>(m, out.data(), data.data(), split);
    check(out, size, k, split[rank], "reduce_scatter");
  } else if (choice == 3) {
    const Split split = random_split(random, n, size);
    std::vector<int64_t> out(static_cast<size_t>(n));
    all_gather(m, out.data(), data.data() + split.begin[rank], split);
    for (int r = 0; r < size; ++r) {
      for (int64_t i = split.begin[r]; i < split.begin[r + 1]; ++i) {
        expect(out[size_t(i)] == value(r, k, i), "all_gather");
      }
    }
  } else if (choice == 4) {
    std::vector<Split> splits;
    for (int r = 0; r < size; ++r) splits.push_back(random_split(random, n, size));
    Split incoming{};
    for (int r = 0; r < size; ++r) {
      incoming.begin[r + 1] = incoming.begin[r] + splits[size_t(r)][rank].size();
    }
    std::vector<int64_t> out(size_t(incoming.begin[size]));
    all_to_all(m, out.data(), data.data(), incoming, splits[size_t(rank)]);
    for (int r = 0; r < size; ++r) {
      const Part part = splits[size_t(r)][rank];
      for (int64_t i = 0; i < part.size(); ++i) {
        expect(out[size_t(incoming.begin[r] + i)] == value(r, k, part.begin + i), "all_to_all");
      }
    }
  } else if (choice == 5) {
    const int root = int(random.below(size));
    broadcast(m, data.data(), n, root);
    for (int64_t i = 0; i < n; ++i) expect(data[size_t(i)] == value(root, k, i), "broadcast");
  } else {
    barrier(m);
  }
}

// Each rank sends round the ring, long messages by turns so that nobody waits for himself.
void ring_of_messages(MemberOf& m, int rounds) {
  const int size = m.world.size;
  const int rank = m.world.rank;
  const int next = (rank + 1) % size;
  const int before = (rank + size - 1) % size;
  uint64_t sent = 0;
  uint64_t received = 0;
  const auto put = [&](int64_t k, int64_t n) {
    const Description said{1, 0, 0, int32_t(k), n, 0, 0, 0};
    const std::vector<int64_t> data = filled(rank, k, n);
    expect(send(m, data.data(), n, next, said, sent), "send");
  };
  const auto take = [&](int64_t k, int64_t n) {
    const Description said{1, 0, 0, int32_t(k), n, 0, 0, 0};
    std::vector<int64_t> data(static_cast<size_t>(n));
    expect(receive(m, data.data(), n, before, said, received), "receive");
    for (int64_t i = 0; i < n; ++i) expect(data[size_t(i)] == value(before, k, i), "message");
  };
  Random random(99);
  for (int64_t k = 0; k < rounds; ++k) {
    const int64_t n = random.below(1500);
    if (rank == 0) {
      take(k, n);
      put(k, n);
    } else {
      put(k, n);
      take(k, n);
    }
  }
}

void run(int size, int rounds, uint32_t first_epoch) {
  Segments segments(size);
  segments.set_epoch(first_epoch);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      const World world = segments.world(rank);
      SpinningWaiter waiter;
      MemberOf m{world, {}, waiter, first_epoch, 0, kSlotBytes, Store::cached};
      Random random(uint64_t(size) * 17);
      for (int64_t k = 0; k < rounds; ++k) one_round(m, random, k);
      if (size > 1) ring_of_messages(m, rounds / 4);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace pyparallel::test

int main() {
  for (int size = 1; size <= 6; ++size) pyparallel::test::run(size, 200, 0);
  // Epochs that wrap around 2^32.
  pyparallel::test::run(3, 200, 0xffffffc0u);
  std::puts("core: every rank folded in order");
  return 0;
}
