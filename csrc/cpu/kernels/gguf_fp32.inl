// Dot products with the rows of a group, in fp32: for processors without the integer dot product.
//
//   x . w = sum over blocks of d (sum of x (q - 8)) + (m + 8 d) (sum of x)
//
// One row of the group a lane, so nothing is summed across lanes; one chain over a block's weights and one
// over blocks, in any tile, so the bits do not depend on M.

constexpr int64_t kFloatRows = 4;

// The sums of each block of x [M, K], for q4_1.
struct PlainRows {
  template <class Block>
  static PlainRows make(const LinearCall& call, Block) {
    const int64_t blocks = call.K / kBlockWeights;
    float* sums = static_cast<float*>(call.workspace);
    for (int64_t i = 0; Block::kScales == 2 && i < call.M * blocks; ++i) {
      const float* x = call.x + i / blocks * call.x_stride + i % blocks * kBlockWeights;
      Vec total = load(x);
      for (int k = W; k < kBlockWeights; k += W) total = add(total, load(x + k));
      sums[i] = sum(total);
    }
    return {sums};
  }
  const float* sums;
};

// to[m * kGroupRows + lane], lanes [lane, lane + n) of rows [m, m + kRows) of x.
template <int kRows, class Block>
inline void dot_lanes(const Group<Block>& group, const LinearCall& call, const float* sums,
                      int64_t lane, int64_t n, float* to) {
  const int64_t blocks = call.K / kBlockWeights;
  Vec acc[kRows];
  for (int r = 0; r < kRows; ++r) acc[r] = zero();
  for (int64_t b = 0; b < blocks; ++b) {
    const float* x = call.x + b * kBlockWeights;
    Vec part[kRows];
    for (int r = 0; r < kRows; ++r) part[r] = zero();
    for (int j = 0; j < Block::kWords; ++j) {
      const uint8_t* at = group.words(b, j);
      __builtin_prefetch(at + kPrefetchBytes, 0, 2);
      // Of q4 to signed nibbles: q - 8.
      const Words words = load_words(at + 4 * lane, n, Block::kBits == 4 ? 0x88888888u : 0u);
#pragma GCC unroll 8
      for (int f = 0; f < 32 / Block::kBits; ++f) {
        // Fields from the lowest up: of q4 weights 0, 16, 1, 17, ... of the word's eight.
        const int k = Block::kBits == 8 ? 4 * j + f : 4 * j + f / 2 + f % 2 * 16;
        const Vec q = signed_field(words, 32 - Block::kBits * (f + 1), 32 - Block::kBits);
        for (int r = 0; r < kRows; ++r) part[r] = fma(set1(x[r * call.x_stride + k]), q, part[r]);
      }
    }
    const Vec d = group.scale(b, 0, lane, n);
    const Vec m = Block::kScales == 2 ? fma(d, set1(8), group.scale(b, 1, lane, n)) : zero();
    for (int r = 0; r < kRows; ++r) {
      acc[r] = fma(part[r], d, acc[r]);
      if (Block::kScales == 2) acc[r] = fma(set1(sums[r * blocks + b]), m, acc[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) store_up_to(to + r * kGroupRows + lane, acc[r], n);
}

// to[m * kGroupRows + lane] = x[m] . the group's row `lane`
template <class Block>
inline void dot_group(const Group<Block>& group, const LinearCall& call, const PlainRows& rows,
                      float* to) {
  for (int64_t lane = 0; lane < group.rows; lane += W) {
    const int64_t n = min_of(W, group.rows - lane);
    LinearCall part = call;
    const float* sums = rows.sums;
    int64_t m = 0;
    for (; m + kFloatRows <= call.M; m += kFloatRows) {
      dot_lanes<kFloatRows>(group, part, sums, lane, n, to + m * kGroupRows);
      part.x += kFloatRows * call.x_stride;
      sums += kFloatRows * (call.K / kBlockWeights);
    }
    for (; m < call.M; ++m) {
      dot_lanes<1>(group, part, sums, lane, n, to + m * kGroupRows);
      part.x += call.x_stride;
      sums += call.K / kBlockWeights;
    }
  }
}
