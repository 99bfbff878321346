// y = epilogue(x W^T) for few rows, W in blocks: one run of bytes a thread, or two with a gate.

// to[m * kGroupRows + i] = x[m] . W[row + i], as far as W has rows; any row.
template <class Block, class Rows>
inline void dot_rows_from(const Weight& weight, int64_t row, const LinearCall& call,
                          const Rows& rows, float* to) {
  const int64_t lane = row % kGroupRows, next = row - lane + kGroupRows;
  dot_group(Group<Block>(weight, row - lane, call.K), call, rows, to);
  if (lane == 0) return;
  // Cut across the groups, as an `up` whose `gate` is not of whole groups is.
  float others[kMaxThinRows * kGroupRows];
  if (next < weight.rows) dot_group(Group<Block>(weight, next, call.K), call, rows, others);
  for (int64_t m = 0; m < call.M; ++m) {
    float* mine = to + m * kGroupRows;
    std::memmove(mine, mine + lane, size_t(kGroupRows - lane) * sizeof(float));
    if (next >= weight.rows) continue;
    std::memcpy(mine + kGroupRows - lane, others + m * kGroupRows, size_t(lane) * sizeof(float));
  }
}

template <class Block>
inline void thin_linear_of_blocks(const LinearCall& call) {
#if defined(PYPARALLEL_BYTE_DOT)
  const auto rows = FixedRows::make(call, Block{});
#else
  const auto rows = PlainRows::make(call, Block{});
#endif
  const bool gated = call.up.data != nullptr;
  alignas(64) float sums[2][kMaxThinRows * kGroupRows];
  int64_t count;
  for (int64_t n = call.begin; n < call.end; n += count) {
    const int64_t row = call.weight.first + n;
    count = min_of(kGroupRows - row % kGroupRows, call.end - n);
    dot_rows_from<Block>(call.weight, row, call, rows, sums[0]);
    if (gated) dot_rows_from<Block>(call.up, call.up.first + n, call, rows, sums[1]);
    for (int64_t m = 0; m < call.M; ++m) {
      for (int64_t i = 0; i < count; i += W) {
        const int64_t left = min_of(W, count - i);
        const float* from = sums[0] + m * kGroupRows + i;
        const Vec gate = gated ? load_up_to(sums[1] + m * kGroupRows + i, left) : zero();
        finish(call, load_up_to(from, left), gate, m, n + i, left);
      }
    }
  }
}
