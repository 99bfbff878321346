// The attention half of a decoder layer: rotation and cache, then one position a row, or one sequence.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "cpu/decoder/decoder.h"

namespace pyparallel::cpu {

namespace {

// log sum exp of G heads' scores over all parts of the keys; of no part: minus infinity.
void note_log_sums(SoftmaxState states, int64_t parts, int64_t G, float* log_sums) {
  for (int64_t g = 0; g < G; ++g) {
    float largest = -std::numeric_limits<float>::infinity(), total = 0.0f;
    for (int64_t part = 0; part < parts; ++part) {
      largest = std::max(largest, states.maximum[part * G + g]);
    }
    for (int64_t part = 0; part < parts; ++part) {
      total += std::exp(states.maximum[part * G + g] - largest) * states.total[part * G + g];
    }
    log_sums[g] = parts == 0 ? largest : largest + std::log(total);
  }
}

}  // namespace

// attended = softmax(q K^T) V of normed's projections, which are stored in the cache first.
void Decoder::attention(const Rows& rows, size_t l, int thread) {
  project(rows, l, 0, thread);
  if (rows.one_sequence && rows.M > 1) {
    attend_together(rows, l, thread);
  } else {
    attend_each(rows, l, thread);
  }
  if (context_) {
    merge_context(rows, thread);
  } else {
    team_->barrier(thread);
  }
}

// Only what later positions need of a layer: its keys and values, stored in the cache.
void Decoder::keys_and_values(const Rows& rows, size_t l, int thread) {
  project(rows, l, shape_.heads * shape_.head_dim, thread);
  const int64_t heads = 2 * shape_.kv_heads;
  const Part part = share(rows.M * heads, team_->size(), thread, 1);
  for (int64_t i = part.begin; i < part.end; ++i) {
    rotate_and_store(rows, l, i / heads, shape_.heads + i % heads);
  }
  team_->barrier(thread);
}

// Outputs [first, (Nq + 2 Nk) D) of normed's projections; of a cut context all, whose parts are exchanged.
void Decoder::project(const Rows& rows, size_t l, int64_t first, int thread) {
  linear(qkv_call(rows, l, thread, first));
  meet(projected_.get(), rows.M, projected(), thread);
}

LinearCall Decoder::qkv_call(const Rows& rows, size_t l, int thread, int64_t first) const {
  const Weight& qkv = weights_.layers[l].qkv;
  LinearCall call =
      call_of(qkv, normed_of(rows, thread), rows.M, shape_.hidden, projected_.get(), projected());
  call.weight.bias = qkv.bias;
  return part_of(call, projected(), thread, first);
}

// One head of row m: a query is normalised, rotated and scaled in place; a key normalised, rotated and
// stored in the cache; a value stored.
void Decoder::rotate_and_store(const Rows& rows, size_t l, int64_t m, int64_t head) const {
  const DecoderShape& s = shape_;
  const DecoderLayer& layer = weights_.layers[l];
  const int64_t D = s.head_dim, half = s.rotary_dim / 2, position = rows.positions[m];
  float* x = projected_.get() + m * projected() + head * D;
  const bool query = head < s.heads, key = !query && head < s.heads + s.kv_heads;
  const int64_t kept = query ? -1 : slot_of(position);
  if (!query && kept < 0) return;
  const float* norm = query ? layer.q_norm : key ? layer.k_norm : nullptr;
  if (norm != nullptr) kernels_->rms_norm(x, norm, s.eps, D, x);
  if ((query || key) && half > 0) {
    kernels_->rope(x, cache_.cos + position * half, cache_.sin + position * half, s.rotary_dim);
  }
  if (query) return kernels_->scale(x, s.softmax_scale, D);
  const int64_t kv = (head - s.heads) % s.kv_heads;
  const int64_t slot = ((rows.sequences[m] * s.kv_heads + kv) * cache_.slots + kept) * D;
  auto* cache = static_cast<unsigned char*>(key ? cache_.keys[l] : cache_.values[l]);
  kernels_->from_float(x, s.cache_precision, D, cache + slot * bytes_of(s.cache_precision));
}

int64_t Decoder::slot_of(int64_t position) const {
  if (cache_.positions == nullptr) return position;
  const int64_t* end = cache_.positions + cache_.slots;
  const int64_t* at = std::lower_bound(cache_.positions, end, position);
  return at != end && *at == position ? at - cache_.positions : -1;
}

Part Decoder::seen_by(int64_t position, int64_t window) const {
  const Part seen{window > 0 ? max_of(0, position + 1 - window) : 0, position + 1};
  if (cache_.positions == nullptr) return seen;
  const auto slots_before = [&](int64_t p) {
    return std::lower_bound(cache_.positions, cache_.positions + cache_.slots, p) -
           cache_.positions;
  };
  return {slots_before(seen.begin), slots_before(seen.end)};
}

AttentionCall Decoder::attention_call(size_t layer, int64_t row, int64_t sequence,
                                      int64_t kv) const {
  const DecoderShape& s = shape_;
  const int64_t D = s.head_dim, G = group();
  const int64_t at = (sequence * s.kv_heads + kv) * cache_.slots * D * bytes_of(s.cache_precision);
  AttentionCall call{};
  call.q = projected_.get() + row * projected() + kv * G * D;
  call.q_row_stride = projected();
  call.q_head_stride = D;
  call.keys = static_cast<const unsigned char*>(cache_.keys[layer]) + at;
  call.values = static_cast<const unsigned char*>(cache_.values[layer]) + at;
  call.key_stride = D;
  call.precision = s.cache_precision;
  call.G = G;
  call.D = D;
  call.out = attended_.get() + row * s.heads * D + kv * G * D;
  call.out_row_stride = s.heads * D;
  call.out_head_stride = D;
  return call;
}

// One position a row: tasks are (row, KV head, kSplitKeys keys), so a long context keeps all threads busy.
// While no row has more keys than that, a task does all of its head and the threads need not meet.
void Decoder::attend_each(const Rows& rows, size_t l, int thread) {
  const DecoderShape& s = shape_;
  const DecoderLayer& layer = weights_.layers[l];
  const int64_t G = group(), D = s.head_dim;
  const int64_t most = ceil_div(cache_.slots, kSplitKeys);
  const auto seen = [&](int64_t m) { return seen_by(rows.positions[m], layer.window); };
  const auto splits = [&](int64_t m) { return ceil_div(seen(m).size(), kSplitKeys); };
  int64_t tasks = 0, longest = 0;
  for (int64_t m = 0; m < rows.M; ++m) {
    tasks += splits(m) * s.kv_heads;
    longest = max_of(longest, splits(m));
  }
  const bool whole = longest <= 1 && tasks == rows.M * s.kv_heads;
  const auto rotate = [&](int64_t m, int64_t kv) {
    for (int64_t g = 0; g < G; ++g) rotate_and_store(rows, l, m, kv * G + g);
    rotate_and_store(rows, l, m, s.heads + kv);
    rotate_and_store(rows, l, m, s.heads + s.kv_heads + kv);
  };
  const auto out_at = [&](int64_t m, int64_t kv) {
    return split_out_.get() + (m * s.kv_heads + kv) * most * G * D;
  };
  const auto state_at = [&](int64_t m, int64_t kv, int64_t split) {
    const int64_t at = ((m * s.kv_heads + kv) * most + split) * G;
    return SoftmaxState{split_maximum_.get() + at, split_total_.get() + at};
  };
  const auto merge = [&](int64_t m, int64_t kv) {
    float* out = attention_call(l, m, rows.sequences[m], kv).out;
    if (context_) {
      note_log_sums(state_at(m, kv, 0), splits(m), G, log_sums_.get() + m * s.heads + kv * G);
    }
    if (splits(m) == 0) return;
    kernels_->merge_attention(out_at(m, kv), G * D, state_at(m, kv, 0), splits(m), G, D, out, D);
  };
  const Part heads = share(rows.M * s.kv_heads, team_->size(), thread, 1);
  if (!whole) {
    for (int64_t i = heads.begin; i < heads.end; ++i) rotate(i / s.kv_heads, i % s.kv_heads);
    team_->barrier(thread);
  }
  const Part part = share(tasks, team_->size(), thread, 1);
  int64_t task = 0;
  for (int64_t m = 0; m < rows.M; ++m) {
    for (int64_t kv = 0; kv < s.kv_heads; ++kv) {
      for (int64_t split = 0; split < splits(m); ++split, ++task) {
        if (task < part.begin || task >= part.end) continue;
        if (whole) rotate(m, kv);
        AttentionCall call = attention_call(l, m, rows.sequences[m], kv);
        call.out = out_at(m, kv) + split * G * D;
        const int64_t begin = seen(m).begin + split * kSplitKeys;
        const int64_t end = min_of(begin + kSplitKeys, seen(m).end);
        kernels_->decode_attention(call, begin, end, state_at(m, kv, split));
        if (whole) merge(m, kv);
      }
    }
  }
  if (whole) return;
  team_->barrier(thread);
  for (int64_t i = heads.begin; i < heads.end; ++i) merge(i / s.kv_heads, i % s.kv_heads);
}

// A chunk of one sequence: tasks are (KV head, block of positions), the longest first.
void Decoder::attend_together(const Rows& rows, size_t l, int thread) {
  const DecoderLayer& layer = weights_.layers[l];
  const DecoderShape& s = shape_;
  constexpr int64_t kBlock = 96;
  const int64_t heads = s.heads + 2 * s.kv_heads;
  const Part turned = share(rows.M * heads, team_->size(), thread, 1);
  for (int64_t i = turned.begin; i < turned.end; ++i)
    rotate_and_store(rows, l, i / heads, i % heads);
  team_->barrier(thread);
  const int64_t blocks = ceil_div(rows.M, kBlock);
  const int64_t tasks = blocks * s.kv_heads;
  for (int64_t task = thread; task < tasks; task += team_->size()) {
    const int64_t block = blocks - 1 - task / s.kv_heads, kv = task % s.kv_heads;
    const int64_t row = block * kBlock;
    AttentionCall call = attention_call(l, row, rows.sequences[0], kv);
    call.workspace = scratch_[size_t(thread)].get();
    kernels_->prefill_attention(call, min_of(kBlock, rows.M - row), rows.positions[0] + row,
                                layer.window);
  }
}

}  // namespace pyparallel::cpu
