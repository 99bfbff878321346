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

void Decoder::greedy(int64_t* tokens) {
  struct Best {
    float value;
    int64_t token;
  };
  std::vector<Best> local;
  const int64_t V = shape_.vocab_rows;
  for (int64_t m = 0; m < logit_rows_; ++m) {
    const float* row = logits_.get() + m * V;
    const int64_t at = V > 0 ? kernels_->argmax(row, V) : 0;
    local.push_back(V > 0 ? Best{row[at], shape_.vocab_begin + at}
                          : Best{-std::numeric_limits<float>::infinity(), shape_.vocab_size - 1});
  }
  const int64_t bytes = logit_rows_ * int64_t(sizeof(Best));
  parts_[0] = local.data();
  if (ranks() > 1) {
    std::memcpy(peers_->mine(bytes), local.data(), size_t(bytes));
    peers_->exchange(bytes, parts_);
  }
  for (int64_t m = 0; m < logit_rows_; ++m) {
    Best best = static_cast<const Best*>(parts_[0])[m];
    for (int r = 1; r < ranks(); ++r) {
      const Best other = static_cast<const Best*>(parts_[r])[m];
      if (other.value > best.value) best = other;
    }
    tokens[m] = best.token;
  }
}

}  // namespace pyparallel::cpu
