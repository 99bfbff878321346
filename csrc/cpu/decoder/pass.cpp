// The way of a call's rows through the layers, in steps: each computes partial sums, which all ranks then
// add up. Step 0 is the embedding; a layer has two, attention and MLP, or one if both read the same x.
#include <cstring>

#include "cpu/decoder/decoder.h"

namespace pyparallel::cpu {

void Decoder::pass(const Rows& rows, bool want_logits, int thread) {
  const size_t layers = weights_.layers.size();
  // Of a chunk only the last row is read after the last layer, and only if logits are wanted.
  const bool chunk =
      layers > 0 && rows.one_sequence && rows.M > max_of(kMaxThinRows, team_->size());
  if (!chunk) {
    run(rows, 0, steps_of(layers), thread);
    if (want_logits) head(rows, thread);
    return;
  }
  const int64_t steps = steps_of(layers - 1);
  if (ranks() > 1 && rows.M >= kExchangeRows) {
    take_turns(rows, steps, thread);
  } else {
    run(rows, 0, steps, thread);
    keys_and_values(rows, layers - 1, thread);
  }
  if (!want_logits) return;
  const Rows last = keep_last(rows, thread);
  run(last, steps, steps_of(layers), thread);
  head(last, thread);
}

void Decoder::run(const Rows& rows, int64_t from, int64_t to, int thread) {
  for (int64_t step = from; step < to; ++step) {
    compute(rows, step, thread);
    // Every context rank has embedded all of them itself.
    show_partial(rows.M, step > 0, thread);
    add_step(rows, step, thread);
  }
}

// Two halves of the rows, of which one computes while the other's sums are on their way: a rank that has
// less to do in a step goes on to the other half instead of waiting. Ends with the last layer's keys and
// values in the cache.
void Decoder::take_turns(const Rows& rows, int64_t steps, int thread) {
  const int64_t middle = rows.M / 2;
  Rows halves[2] = {rows, rows};
  halves[0].M = middle;
  halves[1] = {rows.tokens + middle,
               rows.sequences + middle,
               rows.positions + middle,
               rows.M - middle,
               true,
               middle};
  for (int64_t step = 0; step < steps; ++step) {
    for (int half = 0; half < 2; ++half) {
      if (step > 0) add_step(halves[half], step - 1, thread);
      compute(halves[half], step, thread);
      offer_partial(halves[half].M, step + half > 0, thread);
    }
  }
  for (int half = 0; half < 2; ++half) {
    if (half == 1) team_->barrier(thread, [&] { peers_->await(parts_); });
    add_step(halves[half], steps - 1, thread);
    keys_and_values(halves[half], weights_.layers.size() - 1, thread);
  }
}

// The partial sums of a step.
void Decoder::compute(const Rows& rows, int64_t step, int thread) {
  if (step == 0) return embed(rows, thread);
  const size_t l = layer_of(step);
  const DecoderShape& s = shape_;
  const DecoderLayer& layer = weights_.layers[l];
  if (!s.parallel_residual && step % 2 == 0) return mlp(rows, layer, nullptr, thread);
  attention(rows, l, thread);
  const LinearCall out =
      call_of(layer.out, attended_.get(), rows.M, s.heads * s.head_dim, partial_, s.hidden);
  linear(part_of(out, s.hidden, thread));
  if (!s.parallel_residual) return;
  normalise_rows(rows, layer.mlp_norm, thread);
  mlp(rows, layer, partial_, thread);
}

// Adds what all ranks have shown of a step to x, and norms it for the next.
void Decoder::add_step(const Rows& rows, int64_t step, int thread) {
  const std::vector<DecoderLayer>& layers = weights_.layers;
  const auto norm_of = [&](size_t l) {
    return l < layers.size() ? &layers[l].attention_norm : nullptr;
  };
  if (step == 0) return add_sum(rows, nullptr, nullptr, norm_of(0), thread);
  const size_t l = layer_of(step);
  const DecoderLayer& layer = layers[l];
  if (!shape_.parallel_residual && step % 2 == 1) {
    return add_sum(rows, layer.out.bias, nullptr, &layer.mlp_norm, thread);
  }
  add_sum(rows, layer.down.bias, shape_.parallel_residual ? layer.out.bias : nullptr,
          norm_of(l + 1), thread);
}

// The last row alone, of which every thread now has its own x and normed. No other row is read again.
Decoder::Rows Decoder::keep_last(const Rows& rows, int thread) const {
  const int64_t before = rows.M - 1, H = shape_.hidden;
  const Rows last{rows.tokens + before, rows.sequences + before, rows.positions + before, 1, true};
  for (float* all : {x_.get(), normed_.get()}) {
    std::memcpy(all + thread * H, all + before * H, size_t(H) * sizeof(float));
  }
  return last;
}

// All ranks' partials are there: parts_.
void Decoder::show_partial(int64_t M, bool joins, int thread) {
  team_->barrier(thread, [&] {
    if (joins) join_outputs(partial_, M, shape_.hidden);
    if (ranks() == 1) {
      parts_[0] = partial_;
      return;
    }
    peers_->exchange(M * shape_.hidden * 4, parts_);
    partial_ = static_cast<float*>(peers_->mine(0));
  });
}

// Shows this rank's partial of M rows without waiting for the others'. What was offered before is then
// there, of all ranks: parts_.
void Decoder::offer_partial(int64_t M, bool offered_before, int thread) {
  team_->barrier(thread, [&] {
    if (offered_before) peers_->await(parts_);
    peers_->announce(M * shape_.hidden * 4);
    partial_ = static_cast<float*>(peers_->mine(0));
  });
}

}  // namespace pyparallel::cpu
