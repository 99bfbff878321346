// A decoder whose context is cut over ranks, which are threads here, against one that has it whole.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/decoder/decoder.h"
#include "cpu_decoder_model.h"

namespace pyparallel::test {

// Ranks that share this process's memory. Buffers have the size that was asked for, and what is not
// written is no number.
class ThreadPeers : public cpu::Peers {
 public:
  struct World {
    World(int ranks, int64_t bytes) : size(ranks), most(bytes), arrived(size_t(ranks)) {
      for (auto& slot : slots) slot.resize(size_t(ranks));
    }
    const int size;
    const int64_t most;
    std::vector<std::vector<unsigned char>> slots[4];
    std::vector<std::atomic<int64_t>> arrived;
  };

  ThreadPeers(World& world, int rank) : world_(world), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return world_.size; }
  void* mine(int64_t bytes) override {
    expect(bytes <= world_.most, "an exchange is larger than was promised");
    auto& slot = world_.slots[turn_ % 4][size_t(rank_)];
    slot.assign(size_t(bytes), 0xff);
    return slot.data();
  }
  void announce(int64_t) override { world_.arrived[size_t(rank_)].store(++turn_); }
  void await(const void** parts) override {
    for (int r = 0; r < size(); ++r) {
      while (world_.arrived[size_t(r)].load() < turn_) std::this_thread::yield();
      parts[r] = world_.slots[(turn_ - 1) % 4][size_t(r)].data();
    }
  }

 private:
  World& world_;
  int rank_;
  int64_t turn_ = 0;
};

// The positions that rank c of `ranks` holds: two runs of the prompt, then every `ranks`-th; a rank may
// hold none of the prompt.
inline std::vector<int64_t> held_positions(int ranks, int c, int64_t prompt, int64_t length) {
  std::vector<int64_t> held;
  for (const int chunk : {c, 2 * ranks - 1 - c}) {
    const Part part = part_of(prompt, 2 * ranks, chunk);
    for (int64_t p = part.begin; p < part.end; ++p) held.push_back(p);
  }
  for (int64_t p = prompt + c; p < length; p += ranks) held.push_back(p);
  return held;
}

// Slots of a whole cache to those of a rank, of which the rest is no number.
inline void take_slots(const cpu::DecoderShape& shape, const cpu::DecoderCache& whole,
                       cpu::DecoderCache& own, int64_t prompt) {
  const int64_t D = shape.head_dim, rows = whole.batch * shape.kv_heads;
  const auto take = [&](void* from, void* to) {
    std::fill_n(static_cast<float*>(to), rows * own.slots * D, std::nanf(""));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t s = 0; s < own.slots && own.positions[s] < prompt; ++s) {
        std::memcpy(static_cast<float*>(to) + (row * own.slots + s) * D,
                    static_cast<float*>(from) + (row * whole.slots + own.positions[s]) * D,
                    size_t(D) * sizeof(float));
      }
    }
  };
  for (size_t layer = 0; layer < whole.keys.size(); ++layer) {
    take(whole.keys[layer], own.keys[layer]);
    take(whole.values[layer], own.values[layer]);
  }
}

// Two prompts of different lengths, then steps; the longer one crosses a task of attention.
inline void check_context(int ranks, int64_t prompt, int64_t window) {
  DecoderModel model(window);
  const int64_t V = model.shape.vocab_rows, steps = 6;
  const int64_t starts[2] = {std::max<int64_t>(1, prompt - 7), prompt};
  cpu::Decoder single(model.shape, model.weights, nullptr, std::make_shared<cpu::Team>(2));
  const cpu::DecoderCache whole = model.cache(DecoderModel::kLength);
  single.use_cache(whole);
  std::vector<int64_t> tokens(static_cast<size_t>(prompt));
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = int64_t(i * 7) % V;
  for (int64_t row = 0; row < 2; ++row) single.prefill(tokens.data(), starts[row], row, 0);
  ThreadPeers::World world(ranks, cpu::Decoder::context_bytes(model.shape));
  std::vector<std::vector<int64_t>> held;
  std::vector<cpu::DecoderCache> caches;
  for (int c = 0; c < ranks; ++c) {
    held.push_back(held_positions(ranks, c, prompt, DecoderModel::kLength));
    caches.push_back(model.cache(int64_t(held.back().size())));
    caches.back().positions = held.back().data();
    take_slots(model.shape, whole, caches.back(), prompt);
  }
  const auto run = [&](cpu::Decoder& decoder, std::vector<float>& logits,
                       std::vector<int64_t>& chosen) {
    const int64_t rows[2] = {0, 1};
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t next[2] = {(step * 5 + 3) % V, (step * 11) % V};
      const int64_t positions[2] = {starts[0] + step, starts[1] + step};
      decoder.decode(next, rows, positions, 2);
      int64_t best[2];
      decoder.greedy(best);
      chosen.insert(chosen.end(), best, best + 2);
      logits.insert(logits.end(), decoder.logits(), decoder.logits() + 2 * V);
    }
  };
  std::vector<std::vector<float>> logits(static_cast<size_t>(ranks));
  std::vector<std::vector<int64_t>> chosen(static_cast<size_t>(ranks));
  std::vector<std::thread> threads;
  for (int c = 0; c < ranks; ++c) {
    threads.emplace_back([&, c] {
      cpu::Decoder decoder(model.shape, model.weights, nullptr,
                           std::make_shared<cpu::Team>(1 + c % 2),
                           std::make_shared<ThreadPeers>(world, c));
      decoder.use_cache(caches[size_t(c)]);
      run(decoder, logits[size_t(c)], chosen[size_t(c)]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<float> wanted;
  std::vector<int64_t> wanted_tokens;
  run(single, wanted, wanted_tokens);
  float largest = 0.0f;
  for (const float x : wanted) largest = std::max(largest, std::fabs(x));
  for (size_t c = 0; c < logits.size(); ++c) {
    expect(logits[c] == logits[0], "context ranks have different logits");
    expect(chosen[c] == wanted_tokens, "tokens depend on the cut of the context");
    for (size_t i = 0; i < wanted.size(); ++i) {
      // Two layers of sums of at most 300 terms, in another order in attention alone.
      expect(std::fabs(logits[c][i] - wanted[i]) <= 300 * 6e-8f * largest,
             "logits depend on the cut of the context");
    }
  }
}

}  // namespace pyparallel::test
