// One rank's share of a Llama-like decoder, as raw pointers, and its forward pass in one call.
//
// Letters: M rows (tokens) of a call, H hidden, D head size, Nq and Nk this rank's query and KV heads, F
// its intermediate features, V its vocabulary rows, T slots of the cache, R ranks.
//
//   x = sum_r embedding_r[token]
//   per layer:  x += sum_r attention_r(norm(x)) Wo_r^T + bo;  x += sum_r mlp_r(norm(x)) + bd
//   logits_r = norm(x) head_r^T
//
// Sums over ranks are in rank order, so all ranks hold the same x. Where the context is cut too, the C ranks
// that hold the same weights and different tokens decode as one team: each computes its part of every
// matrix's outputs and attends to its own slots, and they exchange what they have (context.cpp).
//
// Activations are fp32; weights and cache are read in their own precision. The weights belong to the caller and must outlive the decoder.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "core/part.h"
#include "cpu/decoder/peers.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/team.h"

namespace pyparallel::cpu {

// RMSNorm, or LayerNorm where there is a bias. No weight at all: the identity.
struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
};

struct DecoderLayer {
  Norm attention_norm;
  Weight qkv;                     // [(Nq + 2 Nk) D, H]: queries, keys, values
  const float* q_norm = nullptr;  // [D], applied to each head before the rotation
  const float* k_norm = nullptr;
  Weight out;  // [H, Nq D]; its bias is added once, after the sum
  Norm mlp_norm;
  Weight up;           // [F, H], or [2 F, H] = gate, up
  Weight down;         // [H, F]
  int64_t window = 0;  // how many positions, itself included, a position sees; 0: all before it
};

struct DecoderShape {
  int64_t hidden;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t rotary_dim;
  int64_t intermediate;
  int64_t vocab_size;
  int64_t vocab_begin;
  int64_t vocab_rows;
  float eps;
  float softmax_scale;
  bool gated = true;
  bool parallel_residual = false;
  Activation activation = Activation::silu;
  Precision cache_precision = Precision::f32;
  bool bf16_compute = false;
};

struct DecoderWeights {
  Weight embedding;                  // [V, H]
  const float* positions = nullptr;  // [T at least, H], learned positions; or none
  Norm final_norm;
  Weight head;  // [V, H]
  std::vector<DecoderLayer> layers;
};

// Slot t of a sequence holds its token at position t, or at positions[t], which ascend.
struct DecoderCache {
  int64_t batch = 0;
  int64_t slots = 0;
  int64_t length = 0;                  // positions of a sequence, over all context ranks
  const int64_t* positions = nullptr;  // [slots]
  std::vector<void*> keys;             // of each layer [batch, Nk, slots, D]
  std::vector<void*> values;
  const float* cos = nullptr;  // [length, rotary_dim / 2]
  const float* sin = nullptr;
};

// Rows that go through the layers at once; longer calls are cut. Of several ranks' they go in two halves.
constexpr int64_t kChunkRows = 1024;
constexpr int64_t kExchangeRows = kChunkRows / 2;

class Decoder {
 public:
  // `peers` may be null for one rank, and so may `context`, the ranks with other tokens and the same
  // weights.
  Decoder(const DecoderShape& shape, DecoderWeights weights, std::shared_ptr<Peers> peers,
          std::shared_ptr<Team> team, std::shared_ptr<Peers> context = nullptr);

  // The bytes an exchange of peers must be able to hold.
  static int64_t exchange_bytes(const DecoderShape& shape) {
    return kExchangeRows * shape.hidden * 4;
  }

  // The same of `context`: at least one row of the widest.
  static int64_t context_bytes(const DecoderShape& shape);

  // Where keys and values are kept from now on; belongs to the caller.
  void use_cache(DecoderCache cache);

  // M tokens at positions [start, start + M) of sequence `row`, appended to its cache. Leaves the logits
  // of the last. Not where the context is cut: a prompt is worked on where its tokens are.
  void prefill(const int64_t* tokens, int64_t M, int64_t row, int64_t start);
  // One token for each of M sequences, at its own position. Leaves the logits of all.
  void decode(const int64_t* tokens, const int64_t* rows, const int64_t* positions, int64_t M);

  // [M of the last call (prefill: 1), V]; a call of all context ranks.
  const float* logits();
  int64_t logit_rows() const { return logit_rows_; }
  // The global argmax of each row of logits, over all ranks; ties go to the lowest token.
  void greedy(int64_t* tokens);

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  template <class T>
  using Buffer = std::unique_ptr<T[], Free>;
  // The rows of one call: a chunk of one sequence, or one token of each of several.
  struct Rows {
    const int64_t* tokens;
    const int64_t* sequences;
    const int64_t* positions;
    int64_t M;
    bool one_sequence;
    // Where they begin in x and normed, if they are part of a chunk.
    int64_t first = 0;
    // So few that every thread keeps an x of its own and does all rows' sums and norms itself, which
    // is sooner done than waited for.
    bool few() const { return M <= kMaxThinRows; }
  };

  template <class T>
  static Buffer<T> allocate(int64_t n);
  void reserve(int64_t M);
  void check(const Rows& rows) const;
  void forward(const Rows& rows, bool want_logits);
  void pass(const Rows& rows, bool want_logits, int thread);
  int64_t steps_of(size_t layers) const {
    return 1 + int64_t(layers) * (shape_.parallel_residual ? 1 : 2);
  }
  size_t layer_of(int64_t step) const {
    return size_t(step - 1) / (shape_.parallel_residual ? 1 : 2);
  }
  void run(const Rows& rows, int64_t from, int64_t to, int thread);
  void take_turns(const Rows& rows, int64_t steps, int thread);
  void compute(const Rows& rows, int64_t step, int thread);
  void add_step(const Rows& rows, int64_t step, int thread);
  Rows keep_last(const Rows& rows, int thread) const;
  void embed(const Rows& rows, int thread);
  void mlp(const Rows& rows, const DecoderLayer& layer, const float* residual, int thread);
  void head(const Rows& rows, int thread);
  LinearCall qkv_call(const Rows& rows, size_t l, int thread, int64_t first) const;
  LinearCall up_call(const Rows& rows, const DecoderLayer& layer, int thread) const;
  LinearCall head_call(const Rows& rows, int thread) const;
  LinearCall part_of(LinearCall call, int64_t N, int thread, int64_t first = 0) const;
  // The outputs [first, N) that context rank c computes.
  Part outputs_of(int c, int64_t N, int64_t first = 0) const;
  // Brings the other context ranks' outputs into y [M, N], by one thread.
  void join_outputs(float* y, int64_t M, int64_t N);
  // The same, of all threads, which have then met.
  void meet(float* y, int64_t M, int64_t N, int thread);
  void merge_context(const Rows& rows, int thread);
  void merge_row(int64_t m, int64_t row, int thread);
  void linear(const LinearCall& call) const;
  LinearCall call_of(const Weight& weight, const float* x, int64_t M, int64_t K, float* y,
                     int64_t N) const;
  void show_partial(int64_t M, bool joins, int thread);
  void offer_partial(int64_t M, bool offered_before, int thread);
  void add_sum(const Rows& rows, const float* bias, const float* other_bias, const Norm* norm,
               int thread);
  void normalise(const Norm& norm, const float* x, float* y) const;
  void normalise_rows(const Rows& rows, const Norm& norm, int thread);
  // The rows whose sums and norms this thread does, and where it finds them.
  Part rows_of(const Rows& rows, int thread) const;
  float* x_of(const Rows& rows, int thread) const;
  float* normed_of(const Rows& rows, int thread) const;

  void attention(const Rows& rows, size_t layer, int thread);
  void keys_and_values(const Rows& rows, size_t layer, int thread);
  void project(const Rows& rows, size_t layer, int64_t first, int thread);
  void rotate_and_store(const Rows& rows, size_t layer, int64_t m, int64_t head) const;
  void attend_each(const Rows& rows, size_t layer, int thread);
  void attend_together(const Rows& rows, size_t layer, int thread);
  // The slots of row m's position and of the positions that it sees; -1 where another rank has it.
  int64_t slot_of(int64_t position) const;
  Part seen_by(int64_t position, int64_t window) const;
  AttentionCall attention_call(size_t layer, int64_t row, int64_t sequence, int64_t head) const;

  int64_t projected() const { return (shape_.heads + 2 * shape_.kv_heads) * shape_.head_dim; }
  int64_t group() const { return shape_.heads / shape_.kv_heads; }
  int ranks() const { return peers_ ? peers_->size() : 1; }
  int contexts() const { return context_ ? context_->size() : 1; }

  DecoderShape shape_;
  DecoderWeights weights_;
  DecoderCache cache_;
  std::shared_ptr<Peers> peers_;
  std::shared_ptr<Team> team_;
  std::shared_ptr<Peers> context_;
  const Kernels* kernels_ = nullptr;

  int64_t reserved_rows_ = 0;
  int64_t logit_rows_ = 0;
  bool logits_joined_ = false;
  float* partial_ = nullptr;
  const void* parts_[kMaxRanks] = {};
  const void* context_parts_[kMaxRanks] = {};
  // x and normed: [M, H], or one [M, H] a thread where rows are few.
  Buffer<float> x_, normed_, projected_, attended_, inner_, local_partial_, logits_;
  // Decode attention by parts of the keys: [M, Nk, splits, G, D] and [M, Nk, splits, G].
  Buffer<float> split_out_, split_maximum_, split_total_;
  // Of the cut context: log-sum-exp [M, Nq] of this rank's slots, and a row of all ranks' a thread.
  Buffer<float> log_sums_, gathered_;
  std::vector<Buffer<unsigned char>> scratch_;
};

}  // namespace pyparallel::cpu
