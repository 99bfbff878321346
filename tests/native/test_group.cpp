// Groups as they are used: SIMD lanes, algorithms by size, several groups with shared members at
// once, ranks as threads; every result against the rank-ordered sum computed beside it.
#include <algorithm>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "core/pack.h"
#include "cpu/decoder/group_peers.h"
#include "ranks.h"

namespace pyparallel::test {
namespace {

using cpu::DType;
using cpu::Group;
using cpu::Reduction;

template <class T>
constexpr DType kDType = DType::float32;
template <>
constexpr DType kDType<Half> = DType::float16;
template <>
constexpr DType kDType<BFloat16> = DType::bfloat16;
template <>
constexpr DType kDType<int64_t> = DType::int64;

template <class T>
std::vector<T> made(int rank, uint64_t seed, int64_t n) {
  Random random(seed * 64 + uint64_t(rank));
  std::vector<T> data;
  for (int64_t i = 0; i < n; ++i) {
    data.push_back(narrow<T>(Accumulator<T>(double(random.below(200001) - 100000) / 16)));
  }
  return data;
}

template <class T>
bool same(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <class T>
std::vector<T> summed(int size, uint64_t seed, int64_t n) {
  std::vector<std::vector<T>> all;
  std::vector<const T*> at;
  for (int r = 0; r < size; ++r) all.push_back(made<T>(r, seed, n));
  for (const auto& data : all) at.push_back(data.data());
  std::vector<T> total(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    total[size_t(i)] = fold_element<Sum, T>([&](int r) { return at[size_t(r)]; }, size, i);
  }
  return total;
}

template <class T>
void check_reductions(Group& group, uint64_t seed, int64_t n) {
  const int size = group.size();
  const int rank = group.rank();
  const std::vector<T> expected = summed<T>(size, seed, n);
  std::vector<T> data = made<T>(rank, seed, n);
  group.all_reduce(data.data(), n, kDType<T>, Reduction::sum);
  expect(std::equal(data.begin(), data.end(), expected.begin(), same<T>), "all_reduce");

  const Split split = Split::equal(n, size);
  std::vector<T> part(size_t(split[rank].size()));
  data = made<T>(rank, seed, n);
  group.reduce_scatter(part.data(), data.data(), split, kDType<T>, Reduction::sum);
  expect(std::equal(part.begin(), part.end(), expected.begin() + split.begin[rank], same<T>),
         "reduce_scatter");

  std::vector<T> gathered(static_cast<size_t>(n));
  group.all_gather(gathered.data(), part.data(), split, kDType<T>);
  expect(std::equal(gathered.begin(), gathered.end(), expected.begin(), same<T>), "all_gather");
}

void check_exchange(Group& group, uint64_t seed) {
  const int64_t n = 1000;
  const std::vector<float> own = made<float>(group.rank(), seed, n);
  std::copy(own.begin(), own.end(), reinterpret_cast<float*>(group.own_slot()));
  group.exchange(n, DType::float32);
  for (int r = 0; r < group.size(); ++r) {
    const std::vector<float> theirs = made<float>(r, seed, n);
    const auto* seen = reinterpret_cast<const float*>(group.slot_of(r));
    expect(std::equal(theirs.begin(), theirs.end(), seen, same<float>), "exchange");
  }
}

// Exchanges as the halves of a prefill make them: the next is written before the last is awaited, and read
// late. With fewer slots than GroupPeers has, a rank would find a peer's later numbers.
void check_turns(Group& group) {
  const int64_t n = 300;
  cpu::GroupPeers peers(group, n * int64_t(sizeof(float)));
  Random random(uint64_t(group.rank()));
  const auto idle = [&] {
    const int64_t micros = random.below(4) == 0 ? random.below(200) : 0;
    std::this_thread::sleep_for(std::chrono::microseconds(micros));
  };
  for (int k = 0; k <= 60; ++k) {
    if (k < 60) {
      const std::vector<float> own = made<float>(group.rank(), uint64_t(k), n);
      std::copy(own.begin(), own.end(), static_cast<float*>(peers.mine(n * 4)));
    }
    idle();
    const void* parts[kMaxRanks];
    if (k > 0) peers.await(parts);
    if (k < 60) peers.announce(n * 4);
    idle();
    for (int r = 0; k > 0 && r < group.size(); ++r) {
      const std::vector<float> theirs = made<float>(r, uint64_t(k - 1), n);
      const auto* seen = static_cast<const float*>(parts[r]);
      expect(std::equal(theirs.begin(), theirs.end(), seen, same<float>), "turns");
    }
  }
}

// Everybody sends first, more than a ring holds, and other calls come between.
void check_messages(Group& group, uint64_t seed, int64_t n) {
  const int size = group.size();
  const int next = (group.rank() + 1) % size;
  const int before = (group.rank() + size - 1) % size;
  for (int tag = 0; tag < 2; ++tag) {
    const std::vector<float> own = made<float>(group.rank(), seed + uint64_t(tag), n);
    group.send(own.data(), n, DType::float32, next, tag);
  }
  group.barrier();
  for (int tag = 0; tag < 2; ++tag) {
    const std::vector<float> expected = made<float>(before, seed + uint64_t(tag), n);
    std::vector<float> inbox(static_cast<size_t>(n));
    group.receive(inbox.data(), n, DType::float32, before, tag);
    expect(std::equal(inbox.begin(), inbox.end(), expected.begin(), same<float>), "message");
  }
}

void random_calls(Group& group, int calls) {
  Random random(uint64_t(group.size()));
  for (int k = 0; k < calls; ++k) {
    const int64_t kind = random.below(7);
    const int64_t n = random.below(random.below(8) == 0 ? 300000 : 3000);
    if (kind == 0) check_reductions<float>(group, uint64_t(k), n);
    if (kind == 1) check_reductions<Half>(group, uint64_t(k), n);
    if (kind == 2) check_reductions<BFloat16>(group, uint64_t(k), n);
    if (kind == 3) check_reductions<int64_t>(group, uint64_t(k), n);
    if (kind == 4) check_exchange(group, uint64_t(k));
    if (kind == 5) group.barrier();
    if (kind == 6 && group.size() > 1) check_messages(group, uint64_t(k), n);
  }
}

}  // namespace
}  // namespace pyparallel::test

int main() {
  using pyparallel::test::check_turns;
  using pyparallel::test::random_calls;
  using pyparallel::test::run_ranks;
  for (int size = 1; size <= 5; ++size) {
    run_ranks(size, "group of " + std::to_string(size), [](pyparallel::cpu::Group& group) {
      random_calls(group, 30);
      if (group.size() > 1) check_turns(group);
      group.flush();
    });
  }
  // Two groups of the same four ranks, and two halves: each rank goes through three groups in turn.
  using pyparallel::cpu::Group;
  using pyparallel::cpu::Mapping;
  const auto memory_of = [](int size) {
    const int64_t bytes = Group::shared_bytes(size);
    const int descriptor = pyparallel::cpu::create_shared_memory(bytes);
    return std::make_pair(descriptor, std::make_shared<Mapping>(descriptor, 0, bytes));
  };
  const auto whole = memory_of(4);
  const std::vector halves{memory_of(2), memory_of(2)};
  run_ranks(4, "outer", [&](Group& outer) {
    const auto& half = halves[size_t(outer.rank() / 2)];
    Group second("second", outer.rank(), 4, dup(whole.first), std::vector<int>(4, -1),
                 whole.second);
    Group inner("inner", outer.rank() % 2, 2, dup(half.first), std::vector<int>(2, -1),
                half.second);
    for (int k = 0; k < 10; ++k) {
      random_calls(outer, 2);
      random_calls(inner, 3);
      random_calls(second, 2);
    }
  });
  std::puts("groups: same bits as the rank-ordered sum");
  return 0;
}
