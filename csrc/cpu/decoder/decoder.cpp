#include "cpu/decoder/decoder.h"

#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace pyparallel::cpu {

namespace {
// Outputs a thread takes at a time: whole panels of the blocked kernels, whole lines of y.
constexpr int64_t kOutputGrain = 32;

void expect(bool ok, const char* name, const std::string& text) {
  if (!ok) throw std::invalid_argument(std::string(name) + ": " + text);
}
}  // namespace

Decoder::Decoder(const DecoderShape& shape, DecoderWeights weights, std::shared_ptr<Peers> peers,
                 std::shared_ptr<Team> team, std::shared_ptr<Peers> context)
    : shape_(shape),
      weights_(std::move(weights)),
      peers_(std::move(peers)),
      team_(std::move(team)),
      context_(std::move(context)) {
  const auto positive = [](int64_t value, const char* name) {
    expect(value > 0, name, "expected at least 1, got " + std::to_string(value));
  };
  positive(shape.hidden, "hidden");
  positive(shape.heads, "heads");
  positive(shape.kv_heads, "kv_heads");
  positive(shape.head_dim, "head_dim");
  positive(shape.intermediate, "intermediate");
  expect(shape.heads % shape.kv_heads == 0, "kv_heads",
         "expected a divisor of heads=" + std::to_string(shape.heads) + ", got " +
             std::to_string(shape.kv_heads));
  expect(shape.rotary_dim % 2 == 0 && shape.rotary_dim >= 0 && shape.rotary_dim <= shape.head_dim,
         "rotary_dim",
         "expected an even number up to head_dim=" + std::to_string(shape.head_dim) + ", got " +
             std::to_string(shape.rotary_dim));
  expect(ranks() <= kMaxRanks, "ranks",
         "expected at most " + std::to_string(kMaxRanks) + ", got " + std::to_string(ranks()));
  expect(contexts() <= kMaxRanks, "context",
         "expected at most " + std::to_string(kMaxRanks) + ", got " + std::to_string(contexts()));
  scratch_.resize(size_t(team_->size()));
}

void Decoder::use_cache(DecoderCache cache) {
  const size_t layers = weights_.layers.size();
  expect(cache.batch > 0, "batch", "expected at least 1, got " + std::to_string(cache.batch));
  expect(cache.slots > 0, "slots", "expected at least 1, got " + std::to_string(cache.slots));
  expect(cache.length >= cache.slots || cache.positions != nullptr, "length",
         "expected at least slots=" + std::to_string(cache.slots) + ", got " +
             std::to_string(cache.length));
  expect((cache.positions != nullptr) == (contexts() > 1), "positions",
         "expected those of the slots where the context is cut, and none elsewhere");
  expect(cache.keys.size() == layers && cache.values.size() == layers, "keys, values",
         "expected one for each of the " + std::to_string(layers) + " layers, got " +
             std::to_string(cache.keys.size()) + " and " + std::to_string(cache.values.size()));
  expect(shape_.rotary_dim == 0 || (cache.cos != nullptr && cache.sin != nullptr), "cos, sin",
         "expected tables for rotary_dim=" + std::to_string(shape_.rotary_dim) + ", got none");
  cache_ = std::move(cache);
  reserved_rows_ = 0;
}

template <class T>
Decoder::Buffer<T> Decoder::allocate(int64_t n) {
  const size_t bytes = size_t(round_up(max_of(n, 1) * int64_t(sizeof(T)), 64));
  void* p = std::aligned_alloc(64, bytes);
  if (p == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

void Decoder::reserve(int64_t M) {
  const DecoderShape& s = shape_;
  if (M <= reserved_rows_) return;
  const int64_t own_rows = max_of(M, min_of(M, kMaxThinRows) * team_->size());
  x_ = allocate<float>(own_rows * s.hidden);
  normed_ = allocate<float>(own_rows * s.hidden);
  projected_ = allocate<float>(M * projected());
  attended_ = allocate<float>(M * s.heads * s.head_dim);
  inner_ = allocate<float>(M * s.intermediate);
  if (ranks() == 1) local_partial_ = allocate<float>(M * s.hidden);
  if (contexts() > 1) {
    log_sums_ = allocate<float>(M * s.heads);
    gathered_ = allocate<float>(team_->size() * contexts() * s.heads * (s.head_dim + 2));
  }
  logits_ = allocate<float>(cache_.batch * s.vocab_rows);
  const int64_t splits =
      min_of(M, cache_.batch) * s.kv_heads * ceil_div(cache_.slots, kSplitKeys) * group();
  split_out_ = allocate<float>(splits * s.head_dim);
  split_maximum_ = allocate<float>(splits);
  split_total_ = allocate<float>(splits);
  const int64_t widest = max_of(max_of(s.hidden, s.intermediate), s.heads * s.head_dim);
  const int64_t bytes = max_of(kernels_->block_linear_bytes(M, widest),
                               kernels_->prefill_attention_bytes(group(), s.head_dim));
  for (auto& scratch : scratch_) scratch = allocate<unsigned char>(bytes);
  reserved_rows_ = M;
}

void Decoder::check(const Rows& rows) const {
  for (int64_t m = 0; m < rows.M; ++m) {
    expect(rows.tokens[m] >= 0 && rows.tokens[m] < shape_.vocab_size, "tokens",
           "expected 0 <= token < " + std::to_string(shape_.vocab_size) + ", got " +
               std::to_string(rows.tokens[m]));
    expect(rows.positions[m] >= 0 && rows.positions[m] < cache_.length, "positions",
           "position " + std::to_string(rows.positions[m]) + " does not fit the cache's " +
               std::to_string(cache_.length) + " slots; make a longer cache");
    expect(rows.sequences[m] >= 0 && rows.sequences[m] < cache_.batch, "sequences",
           "expected 0 <= row < batch=" + std::to_string(cache_.batch) + ", got " +
               std::to_string(rows.sequences[m]));
  }
}

void Decoder::prefill(const int64_t* tokens, int64_t M, int64_t sequence, int64_t start) {
  expect(M > 0, "tokens", "expected at least one, got none");
  expect(cache_.batch > 0, "cache", "expected use_cache() before the first call");
  expect(contexts() == 1, "prefill",
         "expected a whole context, got one cut over " + std::to_string(contexts()) + " ranks");
  std::vector<int64_t> sequences(size_t(M), sequence), positions(static_cast<size_t>(M));
  for (int64_t m = 0; m < M; ++m) positions[size_t(m)] = start + m;
  check({tokens, sequences.data(), positions.data(), M, true});
  // Chunks of nearly the same size, so that none is thin.
  const int64_t chunks = ceil_div(M, kChunkRows);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t begin = M * c / chunks, end = M * (c + 1) / chunks;
    forward({tokens + begin, sequences.data() + begin, positions.data() + begin, end - begin, true},
            c + 1 == chunks);
  }
}

void Decoder::decode(const int64_t* tokens, const int64_t* sequences, const int64_t* positions,
                     int64_t M) {
  expect(M > 0 && M <= min_of(cache_.batch, kExchangeRows), "tokens",
         "expected 1 to " + std::to_string(min_of(cache_.batch, kExchangeRows)) + ", got " +
             std::to_string(M));
  const Rows rows{tokens, sequences, positions, M, false};
  check(rows);
  forward(rows, true);
}

void Decoder::forward(const Rows& rows, bool want_logits) {
  const Kernels* kernels_now = &kernels();
  // Another instruction set cuts its scratch otherwise.
  if (kernels_now != kernels_) reserved_rows_ = 0;
  kernels_ = kernels_now;
  reserve(rows.M);
  partial_ = ranks() == 1 ? local_partial_.get() : static_cast<float*>(peers_->mine(0));
  logit_rows_ = want_logits ? (rows.one_sequence ? 1 : rows.M) : 0;
  logits_joined_ = false;
  team_->run([&](int thread) { pass(rows, want_logits, thread); });
}

Part Decoder::rows_of(const Rows& rows, int thread) const {
  return rows.few() ? Part{0, rows.M} : share(rows.M, team_->size(), thread, 1);
}

float* Decoder::x_of(const Rows& rows, int thread) const {
  return x_.get() + (rows.few() ? thread * rows.M : rows.first) * shape_.hidden;
}

float* Decoder::normed_of(const Rows& rows, int thread) const {
  return normed_.get() + (rows.few() ? thread * rows.M : rows.first) * shape_.hidden;
}

// partial = act(normed Wup^T) Wdown^T (+ residual)
void Decoder::mlp(const Rows& rows, const DecoderLayer& layer, const float* residual, int thread) {
  const int64_t M = rows.M, H = shape_.hidden;
  linear(up_call(rows, layer, thread));
  meet(inner_.get(), M, shape_.intermediate, thread);
  LinearCall down = call_of(layer.down, inner_.get(), M, shape_.intermediate, partial_, H);
  down.residual = residual;
  down.residual_stride = H;
  linear(part_of(down, H, thread));
}

LinearCall Decoder::up_call(const Rows& rows, const DecoderLayer& layer, int thread) const {
  const int64_t M = rows.M, H = shape_.hidden, F = shape_.intermediate;
  LinearCall up = call_of(layer.up, normed_of(rows, thread), M, H, inner_.get(), F);
  up.act = shape_.activation;
  up.weight.bias = layer.up.bias;
  if (shape_.gated) {
    up.up = up.weight.from_row(F, H);
  }
  return part_of(up, F, thread);
}

LinearCall Decoder::call_of(const Weight& weight, const float* x, int64_t M, int64_t K, float* y,
                            int64_t N) const {
  LinearCall call{};
  call.x = x;
  call.x_stride = K;
  call.M = M;
  call.K = K;
  call.weight = weight;
  // Row-parallel layers add it once, after the sum over ranks.
  call.weight.bias = nullptr;
  call.y = y;
  call.y_stride = N;
  call.bf16_compute = shape_.bf16_compute;
  return call;
}

Part Decoder::outputs_of(int c, int64_t N, int64_t first) const {
  const Part part = share(N - first, contexts(), c, kOutputGrain);
  return {first + part.begin, first + part.end};
}

// This thread's part of the outputs [first, N).
LinearCall Decoder::part_of(LinearCall call, int64_t N, int thread, int64_t first) const {
  const Part own = outputs_of(context_ ? context_->rank() : 0, N, first);
  const Part part = share(own.size(), team_->size(), thread, kOutputGrain);
  call.begin = own.begin + part.begin;
  call.end = own.begin + part.end;
  call.workspace = scratch_[size_t(thread)].get();
  return call;
}

void Decoder::linear(const LinearCall& call) const {
  if (call.begin == call.end) return;
  (call.M <= kMaxThinRows ? kernels_->thin_linear : kernels_->block_linear)(call);
}

// x += sum_r parts_r + biases; normed = norm(x), one pass over each row.
void Decoder::add_sum(const Rows& rows, const float* bias, const float* other_bias,
                      const Norm* norm, int thread) {
  const int64_t H = shape_.hidden;
  const Part part = rows_of(rows, thread);
  for (int64_t m = part.begin; m < part.end; ++m) {
    const float* parts[kMaxRanks];
    for (int r = 0; r < ranks(); ++r) parts[r] = static_cast<const float*>(parts_[r]) + m * H;
    float* x = x_of(rows, thread) + m * H;
    kernels_->add_parts(x, parts, ranks(), bias, H);
    if (other_bias != nullptr) kernels_->add_parts(x, &other_bias, 1, nullptr, H);
    if (norm != nullptr) normalise(*norm, x, normed_of(rows, thread) + m * H);
  }
  if (!rows.few()) team_->barrier(thread);
}

void Decoder::normalise(const Norm& norm, const float* x, float* y) const {
  if (norm.weight == nullptr) {
    std::memcpy(y, x, size_t(shape_.hidden) * sizeof(float));
  } else if (norm.bias != nullptr) {
    kernels_->layer_norm(x, norm.weight, norm.bias, shape_.eps, shape_.hidden, y);
  } else {
    kernels_->rms_norm(x, norm.weight, shape_.eps, shape_.hidden, y);
  }
}

void Decoder::normalise_rows(const Rows& rows, const Norm& norm, int thread) {
  const int64_t H = shape_.hidden;
  const Part part = rows_of(rows, thread);
  for (int64_t m = part.begin; m < part.end; ++m) {
    normalise(norm, x_of(rows, thread) + m * H, normed_of(rows, thread) + m * H);
  }
  if (!rows.few()) team_->barrier(thread);
}

}  // namespace pyparallel::cpu
