// The peer kernels of csrc/cuda on the host: every GPU is R x B x L threads (ranks, blocks of a rank, lanes
// of a block) over PeerWorld segments in plain memory. Under ThreadSanitizer this shows each sync, flag
// and slot the kernels rely on; the results must be, bit for bit, those of the sequential fold.
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "core/collective.h"
#include "cuda/world/all_reduce_norm.h"
#include "cuda/world/peer_world.h"
#include "host_block.h"

using namespace pyparallel;
using namespace pyparallel::cuda;
using test::expect;
using test::Random;
using test::ThreadRowLanes;

namespace {

constexpr int64_t kSlot = 2048;

struct HostWaiter {
  std::chrono::steady_clock::time_point started;
  void begin(uint32_t) { started = std::chrono::steady_clock::now(); }
  bool again(int peer) {
    std::this_thread::yield();
    if (std::chrono::steady_clock::now() - started > std::chrono::seconds(60)) {
      test::fail("no word from rank " + std::to_string(peer));
    }
    return true;
  }
  bool mismatch(int peer) { test::fail("rank " + std::to_string(peer) + " made another call"); }
  bool miscounted(int peer, int64_t, int64_t) { return mismatch(peer); }
};

using HostMember = Member<ThreadRowLanes, HostWaiter>;

// The segments and epochs of R ranks, kept over several calls as on a GPU.
struct HostPeers {
  int size, blocks;
  std::vector<std::vector<unsigned char*>> pages;
  std::vector<PeerWorld> worlds;
  std::vector<std::vector<uint32_t>> epochs;

  HostPeers(int ranks, int of_blocks) : size(ranks), blocks(of_blocks) {
    const size_t bytes = size_t(PeerWorld::segment_bytes(ranks, kSlot));
    PeerWorld world{};
    world.size = ranks;
    world.slot_bytes = kSlot;
    for (int r = 0; r < ranks; ++r) {
      auto* base = static_cast<unsigned char*>(
          std::aligned_alloc(kLine, size_t(round_up(int64_t(bytes), kLine))));
      std::memset(base, 0, bytes);
      world.base[r] = base;
    }
    for (int r = 0; r < ranks; ++r) {
      world.rank = r;
      worlds.push_back(world);
      epochs.emplace_back(size_t(kPeerBlocks), 0u);
    }
  }
  ~HostPeers() {
    for (int r = 0; r < size; ++r) std::free(worlds[0].base[r]);
  }

  // One launch on every rank: body(member, rank, block) on the lanes of every block.
  template <class Body>
  void launch(int lanes, uint32_t signature, Body body) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) {
      for (int block = 0; block < blocks; ++block) {
        threads.emplace_back([&, rank, block] {
          World world;
          test::run_lanes(lanes, [&](const ThreadRowLanes& mine) {
            make_world(mine, worlds[size_t(rank)], block, world);
            HostWaiter waiter;
            uint32_t& epoch = epochs[size_t(rank)][size_t(block)];
            HostMember member{world, mine, waiter, epoch, signature, kSlot, Store::cached};
            body(member, rank, block);
            mine.sync();
            if (mine.index() == 0) epoch = member.epoch;
          });
        });
      }
    }
    for (std::thread& thread : threads) thread.join();
  }
};

template <class T>
std::vector<T> random_values(Random& random, int64_t n) {
  std::vector<T> values;
  for (int64_t i = 0; i < n; ++i) {
    values.push_back(narrow<T>(float(random.below(2001) - 1000) * 0.00371f));
  }
  return values;
}

template <class T>
void expect_same(const std::vector<T>& got, const std::vector<T>& want, const std::string& what) {
  expect(got.size() == want.size(), what + ": size");
  if (got.empty()) return;
  expect(std::memcmp(got.data(), want.data(), got.size() * sizeof(T)) == 0, what);
}

template <class T>
std::vector<T> folded(const std::vector<std::vector<T>>& inputs) {
  std::vector<T> out(inputs[0].size());
  const auto source = [&](int r) -> const T* { return inputs[size_t(r)].data(); };
  SingleRowLane().fold<Sum>(out.data(), source, int(inputs.size()), int64_t(out.size()),
                            Store::cached);
  return out;
}

template <class T>
void test_all_reduce_norm(HostPeers& peers, int lanes, Random& random, int64_t rows,
                          int64_t hidden) {
  constexpr int W = kVecWidth<T>;
  const int64_t n = rows * hidden;
  std::vector<std::vector<T>> x;
  for (int r = 0; r < peers.size; ++r) x.push_back(random_values<T>(random, n));
  const auto residual = random_values<T>(random, n), weight = random_values<T>(random, hidden);
  // The plain path: all-reduce, then the norm with residual, by the same number of lanes.
  const auto summed = folded(x);
  std::vector<T> want_h(size_t(n), T{}), want_y(size_t(n), T{});
  std::vector<float> rstd(size_t(rows) + 1);
  const RmsNorm<T> plain{summed.data(), residual.data(), weight.data(),
                         want_y.data(), want_h.data(),   rstd.data(),
                         rows,          hidden,          1e-5f};
  test::run_lanes(lanes, [&](const ThreadRowLanes& mine) {
    for (int64_t row = 0; row < rows; ++row) rms_norm_row<W>(mine, plain, row);
  });
  for (const bool one_shot : {true, false}) {
    if (!one_shot && kSlot / (peers.size + 2) / kLine * kLine < hidden * int64_t(sizeof(T)))
      continue;
    std::vector<std::vector<T>> h(size_t(peers.size), std::vector<T>(size_t(n), T{}));
    std::vector<std::vector<T>> y = h;
    peers.launch(lanes, 7, [&](HostMember& m, int rank, int block) {
      const size_t r = size_t(rank);
      const AllReduceNorm<T> a{
          x[r].data(), residual.data(), weight.data(), h[r].data(), y[r].data(),
          rows,        hidden,          1e-5f};
      const Part mine = part_of(rows, peers.blocks, block);
      expect(one_shot ? one_shot_all_reduce_norm<W>(m, a, mine)
                      : two_shot_all_reduce_norm<W>(m, a, mine),
             "all_reduce_norm");
    });
    for (int r = 0; r < peers.size; ++r) {
      expect_same(h[size_t(r)], want_h, "all_reduce_norm: h");
      expect_same(y[size_t(r)], want_y, "all_reduce_norm: y");
    }
  }
}

// The collectives over several blocks, with uneven parts.
void test_cuts(HostPeers& peers, int lanes, Random& random) {
  const int size = peers.size;
  Split split{};
  for (int r = 0; r < size; ++r) split.begin[r + 1] = split.begin[r] + random.below(900);
  const int64_t n = split.begin[size];
  std::vector<std::vector<BFloat16>> input;
  for (int r = 0; r < size; ++r) input.push_back(random_values<BFloat16>(random, n));
  const auto total = folded(input);
  std::vector<std::vector<BFloat16>> scattered, gathered;
  for (int r = 0; r < size; ++r) {
    scattered.emplace_back(size_t(split[r].size()));
    gathered.emplace_back(size_t(n));
  }
  peers.launch(lanes, 8, [&](HostMember& m, int rank, int block) {
    const BlockCut cut(split, peers.blocks, block, kShareGrain<BFloat16>);
    reduce_scatter<Sum>(m, scattered[size_t(rank)].data(),
                        static_cast<const BFloat16*>(input[size_t(rank)].data()), cut);
  });
  peers.launch(lanes, 9, [&](HostMember& m, int rank, int block) {
    const BlockCut cut(split, peers.blocks, block, kShareGrain<BFloat16>);
    all_gather(m, gathered[size_t(rank)].data(),
               static_cast<const BFloat16*>(scattered[size_t(rank)].data()), cut);
  });
  for (int r = 0; r < size; ++r)
    expect_same(gathered[size_t(r)], total, "reduce_scatter + all_gather");

  // Rank a sends (a + 2 b) % 5 * 37 elements to rank b.
  const auto count = [](int a, int b) { return int64_t((a + 2 * b) % 5) * 37; };
  std::vector<std::vector<BFloat16>> sent, received, want;
  std::vector<Split> out(size_t(size), Split{}), in(size_t(size), Split{});
  for (int r = 0; r < size; ++r) {
    for (int q = 0; q < size; ++q) {
      in[size_t(r)].begin[q + 1] = in[size_t(r)].begin[q] + count(r, q);
      out[size_t(r)].begin[q + 1] = out[size_t(r)].begin[q] + count(q, r);
    }
    sent.push_back(random_values<BFloat16>(random, in[size_t(r)].begin[size]));
    received.emplace_back(size_t(out[size_t(r)].begin[size]));
  }
  for (int r = 0; r < size; ++r) {
    want.emplace_back();
    for (int q = 0; q < size; ++q) {
      const Part part = in[size_t(q)][r];
      want.back().insert(want.back().end(), sent[size_t(q)].begin() + part.begin,
                         sent[size_t(q)].begin() + part.end);
    }
  }
  peers.launch(lanes, 10, [&](HostMember& m, int rank, int block) {
    const size_t r = size_t(rank);
    const int64_t grain = kShareGrain<BFloat16>;
    all_to_all(m, received[r].data(), static_cast<const BFloat16*>(sent[r].data()),
               BlockCut(out[r], peers.blocks, block, grain),
               BlockCut(in[r], peers.blocks, block, grain));
  });
  for (int r = 0; r < size; ++r) expect_same(received[size_t(r)], want[size_t(r)], "all_to_all");
}

}  // namespace

int main() {
  Random random(11);
  int calls = 0;
  for (const int size : {1, 2, 3}) {
    for (const int lanes : {1, 3}) {
      HostPeers peers(size, 2);
      for (const int64_t rows : {0, 1, 5, 9}) {
        test_all_reduce_norm<BFloat16>(peers, lanes, random, rows, 64);
        test_all_reduce_norm<float>(peers, lanes, random, rows, 84);
        test_cuts(peers, lanes, random);
        ++calls;
      }
    }
  }
  std::printf("cuda peers: %d rounds passed\n", calls);
}
