// The compute kernels and the decoder under sanitizers: every instruction set this processor has, buffers
// of exactly the size that is asked for, threads that meet at barriers, and one that fails.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/decoder/decoder.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/team.h"
#include "cpu_context_checks.h"
#include "cpu_decoder_model.h"
#include "cpu_element_checks.h"
#include "cpu_kernel_checks.h"

// Instead of the library's: what nobody has written is no number.
extern "C" void* aligned_alloc(size_t alignment, size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) return nullptr;
  return std::memset(memory, 0xff, bytes);
}

using namespace pyparallel;
using namespace pyparallel::cpu;
using namespace pyparallel::test;

namespace {

// A decoder of one rank: prefill, then decode, on `threads`; returns all logits it left.
std::vector<float> decode(int threads) {
  DecoderModel model;
  const int64_t V = model.shape.vocab_rows, B = DecoderModel::kBatch;
  Decoder decoder(model.shape, model.weights, nullptr, std::make_shared<Team>(threads));
  decoder.use_cache(model.cache(DecoderModel::kLength));
  std::vector<float> all;
  const auto keep = [&] {
    all.insert(all.end(), decoder.logits(), decoder.logits() + decoder.logit_rows() * V);
  };
  std::vector<int64_t> tokens(290);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = int64_t(i * 7) % V;
  for (int64_t sequence = 0; sequence < B; ++sequence) {
    decoder.prefill(tokens.data(), sequence == 0 ? 290 : 13, sequence, 0);
    keep();
  }
  const int64_t sequences[2] = {1, 0};
  for (int64_t step = 0; step < 5; ++step) {
    int64_t next[2];
    decoder.greedy(next);
    next[1] = next[0];
    const int64_t positions[2] = {13 + step, 290 + step};
    decoder.decode(next, sequences, positions, 2);
    keep();
  }
  return all;
}

void check_team() {
  Team team(3);
  std::vector<int> counts(3, 0);
  for (int run = 0; run < 200; ++run) {
    int shared = 0;
    team.run([&](int thread) {
      ++counts[size_t(thread)];
      for (int round = 0; round < 5; ++round) {
        team.barrier(thread, [&] { shared = round; });
        expect(shared == round, "the action was not seen");
        team.barrier(thread);
      }
    });
    if (run % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    for (int failing = 0; failing < 3; ++failing) {
      bool thrown = false;
      try {
        team.run([&](int thread) {
          team.barrier(thread);
          if (thread == failing) throw std::runtime_error("broken");
          team.barrier(thread);
          team.barrier(thread);
        });
      } catch (const std::runtime_error& error) {
        thrown = std::string(error.what()) == "broken";
      }
      expect(thrown, "a failure on a thread is lost");
    }
  }
  for (const int count : counts) expect(count == 200, "a thread has missed a run");
}

}  // namespace

int main() {
  check_team();
  for (int level = 0; level <= int(detected_isa()); ++level) {
    isa_in_use().store(Isa(level));
    const Kernels& k = kernels();
    Random random(uint64_t(level) + 1);
    check_conversions(k, random, Precision::bf16);
    check_conversions(k, random, Precision::f16);
    for (int i = 0; i < 50; ++i) check_argmax(k, random);
    for (int i = 0; i < 12; ++i) {
      for (const Precision p : {Precision::f32, Precision::bf16, Precision::f16, Precision::i8,
                                Precision::q4_0, Precision::q4_1, Precision::q8_0}) {
        check_linear(k, random, p, i % 2 == 1);
        if (p >= Precision::i8) continue;
        check_attention(k, random, p);
        check_rank_sum(k, random, p);
      }
    }
    const auto alone = decode(1), together = decode(3);
    expect(alone == together, "bits depend on the number of threads");
    for (const int ranks : {2, 3, 5}) {
      for (const int64_t prompt : {1, 30, 290}) {
        check_context(ranks, prompt, 0);
        check_context(ranks, prompt, 17);
      }
    }
    for (const float x : alone) expect(std::isfinite(x), "a logit is not finite");
    std::printf("%s: ok\n", isa_name(Isa(level)));
  }
}
