// Decoding where the context is cut: the ranks hold the same weights and different slots of the cache.
//
// Between the layers all hold the same rows. A matrix's outputs are computed in parts, rank c those of
// outputs_of(c), and exchanged, so that its weights are read once by all ranks together and its sums are
// those of one rank, bit for bit. Attention is computed by each rank over its own slots for all heads, and
// merged by log-sum-exp in rank order:
//
//   o = sum_c exp(lse_c - max lse) o_c / sum_c exp(lse_c - max lse)
//
// A layer has five exchanges: q, k and v; o and lse; the attention's outputs; the MLP's inner ones; its
// outputs.
#include <cstring>
#include <limits>

#include "cpu/decoder/decoder.h"

namespace pyparallel::cpu {

namespace {
// What an exchange carries in one message where a row is shorter.
constexpr int64_t kLeastBytes = 1 << 18;
}  // namespace

int64_t Decoder::context_bytes(const DecoderShape& s) {
  int64_t widest = s.heads * (s.head_dim + 1);
  for (const int64_t row :
       {s.hidden, s.intermediate, s.vocab_rows, (s.heads + 2 * s.kv_heads) * s.head_dim}) {
    widest = max_of(widest, row);
  }
  return max_of(kLeastBytes, widest * int64_t(sizeof(float)));
}

// As many rows at a time as an exchange holds of the widest part.
void Decoder::join_outputs(float* y, int64_t M, int64_t N) {
  if (!context_) return;
  const int C = contexts(), rank = context_->rank();
  int64_t widest = 1;
  for (int c = 0; c < C; ++c) widest = max_of(widest, outputs_of(c, N).size());
  const int64_t most = context_bytes(shape_) / (widest * int64_t(sizeof(float)));
  const Part own = outputs_of(rank, N);
  for (int64_t first = 0; first < M; first += most) {
    const int64_t rows = min_of(most, M - first), bytes = rows * widest * int64_t(sizeof(float));
    auto* mine = static_cast<float*>(context_->mine(bytes));
    for (int64_t m = 0; m < rows; ++m) {
      std::memcpy(mine + m * own.size(), y + (first + m) * N + own.begin,
                  size_t(own.size()) * sizeof(float));
    }
    const void* parts[kMaxRanks];
    context_->exchange(bytes, parts);
    for (int c = 0; c < C; ++c) {
      if (c == rank) continue;
      const Part part = outputs_of(c, N);
      for (int64_t m = 0; m < rows; ++m) {
        std::memcpy(y + (first + m) * N + part.begin,
                    static_cast<const float*>(parts[c]) + m * part.size(),
                    size_t(part.size()) * sizeof(float));
      }
    }
  }
}

void Decoder::meet(float* y, int64_t M, int64_t N, int thread) {
  team_->barrier(thread, [&] { join_outputs(y, M, N); });
}

// attended and log_sums_ of this rank's slots to those of all slots.
void Decoder::merge_context(const Rows& rows, int thread) {
  const int64_t D = shape_.head_dim, width = shape_.heads * (D + 1);
  const int64_t row_bytes = width * int64_t(sizeof(float));
  const int64_t most = context_bytes(shape_) / row_bytes;
  for (int64_t first = 0; first < rows.M; first += most) {
    const int64_t count = min_of(most, rows.M - first);
    team_->barrier(thread, [&] {
      auto* mine = static_cast<float*>(context_->mine(count * row_bytes));
      for (int64_t m = 0; m < count; ++m) {
        const int64_t row = first + m;
        std::memcpy(mine + m * width, attended_.get() + row * shape_.heads * D,
                    size_t(shape_.heads * D) * sizeof(float));
        std::memcpy(mine + m * width + shape_.heads * D, log_sums_.get() + row * shape_.heads,
                    size_t(shape_.heads) * sizeof(float));
      }
      context_->exchange(count * row_bytes, context_parts_);
    });
    const Part part = share(count, team_->size(), thread, 1);
    for (int64_t m = part.begin; m < part.end; ++m) merge_row(m, first + m, thread);
    team_->barrier(thread);
  }
}

// Row `row`, which is the exchange's m-th: every rank's o is normalised, so its lse is its maximum, with a
// total of 1.
void Decoder::merge_row(int64_t m, int64_t row, int thread) {
  const int64_t N = shape_.heads, D = shape_.head_dim, C = contexts();
  float* outs = gathered_.get() + thread * C * N * (D + 2);
  float *maxima = outs + C * N * D, *totals = maxima + C * N;
  for (int64_t c = 0; c < C; ++c) {
    const float* from = static_cast<const float*>(context_parts_[c]) + m * N * (D + 1);
    std::memcpy(outs + c * N * D, from, size_t(N * D) * sizeof(float));
    std::memcpy(maxima + c * N, from + N * D, size_t(N) * sizeof(float));
    for (int64_t n = 0; n < N; ++n) totals[c * N + n] = 1.0f;
    // A rank without a slot that this row sees has written no o.
    for (int64_t n = 0; n < N; ++n) {
      if (maxima[c * N + n] == -std::numeric_limits<float>::infinity()) {
        std::memset(outs + (c * N + n) * D, 0, size_t(D) * sizeof(float));
      }
    }
  }
  kernels_->merge_attention(outs, N * D, {maxima, totals}, C, N, D, attended_.get() + row * N * D,
                            D);
}

}  // namespace pyparallel::cpu
