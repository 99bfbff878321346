// A small decoder with random weights that live as long as it does.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "check.h"
#include "cpu/decoder/decoder.h"
#include "cpu_kernel_checks.h"

namespace pyparallel::test {

struct DecoderModel {
  explicit DecoderModel(int64_t window = 0) {
    const int64_t H = 40, D = 12, N = 4, Nk = 2, F = 50, V = 61;
    shape.hidden = H;
    shape.heads = N;
    shape.kv_heads = Nk;
    shape.head_dim = D;
    shape.rotary_dim = 8;
    shape.intermediate = F;
    shape.vocab_size = shape.vocab_rows = V;
    shape.eps = 1e-5f;
    shape.softmax_scale = 0.3f;
    weights.embedding = weight(V, H);
    weights.final_norm = {hold(H), nullptr};
    weights.head = weight(V, H);
    for (int layer = 0; layer < 2; ++layer) {
      cpu::DecoderLayer l;
      l.attention_norm = {hold(H), nullptr};
      l.qkv = weight((N + 2 * Nk) * D, H);
      l.out = weight(H, N * D);
      l.mlp_norm = {hold(H), nullptr};
      l.up = weight(2 * F, H);
      l.down = weight(H, F);
      l.window = layer == 1 ? window : 0;
      weights.layers.push_back(l);
    }
    cos = hold(kLength * 4);
    sin = hold(kLength * 4);
  }

  // A cache of `slots` a sequence, its memory this model's.
  cpu::DecoderCache cache(int64_t slots) {
    cpu::DecoderCache made;
    made.batch = kBatch;
    made.slots = slots;
    made.length = kLength;
    made.cos = cos;
    made.sin = sin;
    for (size_t layer = 0; layer < weights.layers.size(); ++layer) {
      for (auto* all : {&made.keys, &made.values}) {
        all->push_back(hold(kBatch * shape.kv_heads * slots * shape.head_dim));
      }
    }
    return made;
  }

  float* hold(int64_t n) {
    held.push_back(values(random, n));
    return held.back().data();
  }
  cpu::Weight weight(int64_t rows, int64_t columns) {
    return {hold(rows * columns), nullptr, nullptr, cpu::Precision::f32};
  }

  static constexpr int64_t kLength = 300, kBatch = 2;
  Random random{7};
  std::deque<std::vector<float>> held;
  cpu::DecoderShape shape{};
  cpu::DecoderWeights weights;
  const float* cos;
  const float* sin;
};

}  // namespace pyparallel::test
