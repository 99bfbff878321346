// The two ends of a decoder, cut over the vocabulary: from tokens to x, and from x to logits and tokens.
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/decoder/decoder.h"

namespace pyparallel::cpu {

// partial = embedding_r[token], x = positions or 0
void Decoder::embed(const Rows& rows, int thread) {
  const int64_t H = shape_.hidden;
  const Part shown = share(rows.M, team_->size(), thread, 1);
  for (int64_t m = shown.begin; m < shown.end; ++m) {
    const int64_t row = rows.tokens[m] - shape_.vocab_begin;
    float* to = partial_ + m * H;
    if (row >= 0 && row < shape_.vocab_rows) {
      kernels_->weight_row(weights_.embedding, row, H, to);
    } else {
      std::memset(to, 0, size_t(H) * sizeof(float));
    }
  }
  const Part part = rows_of(rows, thread);
  for (int64_t m = part.begin; m < part.end; ++m) {
    float* x = x_of(rows, thread) + m * H;
    if (weights_.positions != nullptr) {
      std::memcpy(x, weights_.positions + rows.positions[m] * H, size_t(H) * sizeof(float));
    } else {
      std::memset(x, 0, size_t(H) * sizeof(float));
    }
  }
}

void Decoder::head(const Rows& rows, int thread) {
  const int64_t H = shape_.hidden;
  const int64_t first = rows.M - logit_rows_;
  const Part part =
      rows.few() ? Part{0, logit_rows_} : share(logit_rows_, team_->size(), thread, 1);
  float* normed = normed_of(rows, thread);
  for (int64_t m = part.begin; m < part.end; ++m) {
    normalise(weights_.final_norm, x_of(rows, thread) + (first + m) * H, normed + m * H);
  }
  if (!rows.few()) team_->barrier(thread);
  linear(head_call(rows, thread));
}

LinearCall Decoder::head_call(const Rows& rows, int thread) const {
  const int64_t H = shape_.hidden, V = shape_.vocab_rows;
  LinearCall call =
      call_of(weights_.head, normed_of(rows, thread), logit_rows_, H, logits_.get(), V);
  call.weight.bias = weights_.head.bias;
  return part_of(call, V, thread);
}

const float* Decoder::logits() {
  if (!logits_joined_) join_outputs(logits_.get(), logit_rows_, shape_.vocab_rows);
  logits_joined_ = true;
  return logits_.get();
}

void Decoder::greedy(int64_t* tokens) {
  struct Best {
    float value;
    int64_t token;
  };
  std::vector<Best> best;
  const int64_t V = shape_.vocab_rows;
  const Part own = outputs_of(context_ ? context_->rank() : 0, V);
  for (int64_t m = 0; m < logit_rows_; ++m) {
    const float* row = logits_.get() + m * V + own.begin;
    const int64_t at = own.size() > 0 ? kernels_->argmax(row, own.size()) : 0;
    best.push_back(own.size() > 0
                       ? Best{row[at], shape_.vocab_begin + own.begin + at}
                       : Best{-std::numeric_limits<float>::infinity(), shape_.vocab_size - 1});
  }
  // Ranks hold ascending tokens, first over the context, then over the vocabulary's cut.
  for (Peers* peers : {context_.get(), peers_.get()}) {
    if (peers == nullptr) continue;
    const int64_t bytes = logit_rows_ * int64_t(sizeof(Best));
    const void* parts[kMaxRanks];
    std::memcpy(peers->mine(bytes), best.data(), size_t(bytes));
    peers->exchange(bytes, parts);
    for (int64_t m = 0; m < logit_rows_; ++m) {
      best[size_t(m)] = static_cast<const Best*>(parts[0])[m];
      for (int r = 1; r < peers->size(); ++r) {
        const Best other = static_cast<const Best*>(parts[r])[m];
        if (other.value > best[size_t(m)].value) best[size_t(m)] = other;
      }
    }
  }
  for (int64_t m = 0; m < logit_rows_; ++m) tokens[m] = best[size_t(m)].token;
}

}  // namespace pyparallel::cpu
