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

// acc[r][l] += the part of blocks [b, b + kBlocks) in x[m + r] . the rows of lanes [lane + l W, ..), of which
// there are n[l]. A block's sum is one chain, so several blocks and lanes go together until the
// multipliers are never waited for.
template <int kRows, int kLanes, int kBlocks, class Block>
inline void add_blocks(const Group<Block>& group, const LinearCall& call, const float* sums,
                       int64_t b, int64_t lane, const int64_t (&n)[kLanes],
                       Vec (&acc)[kRows][kLanes]) {
  const int64_t blocks = call.K / kBlockWeights;
  const float* x = call.x + b * kBlockWeights;
  Vec part[kBlocks][kRows][kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kBlocks * kRows * kLanes; ++i) (&part[0][0][0])[i] = zero();
#pragma GCC unroll 1
  for (int j = 0; j < Block::kWords; ++j) {
    Words words[kBlocks][kLanes];
#pragma GCC unroll 4
    for (int i = 0; i < kBlocks; ++i) {
      const uint8_t* at = group.words(b + i, j);
      __builtin_prefetch(at + kPrefetchBytes, 0, 2);
#pragma GCC unroll 4
      for (int l = 0; l < kLanes; ++l) {
        // Of q4 to signed nibbles: q - 8.
        words[i][l] =
            load_words(at + 4 * (lane + l * W), n[l], Block::kBits == 4 ? 0x88888888u : 0u);
      }
    }
#pragma GCC unroll 8
    for (int f = 0; f < 32 / Block::kBits; ++f) {
      // Fields from the lowest up: of q4 weights 0, 16, 1, 17, ... of the word's eight.
      const int k = Block::kBits == 8 ? 4 * j + f : 4 * j + f / 2 + f % 2 * 16;
#pragma GCC unroll 4
      for (int i = 0; i < kBlocks; ++i) {
        Vec q[kLanes];
#pragma GCC unroll 4
        for (int l = 0; l < kLanes; ++l) {
          q[l] = signed_field(words[i][l], 32 - Block::kBits * (f + 1), 32 - Block::kBits);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Vec value = set1(x[r * call.x_stride + i * kBlockWeights + k]);
#pragma GCC unroll 4
          for (int l = 0; l < kLanes; ++l) part[i][r][l] = fma(value, q[l], part[i][r][l]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kBlocks; ++i) {
#pragma GCC unroll 4
    for (int l = 0; l < kLanes; ++l) {
      const int64_t first = lane + l * W;
      const Vec d = group.scale(b + i, 0, first, n[l]);
      const Vec m =
          Block::kScales == 2 ? fma(d, set1(8), group.scale(b + i, 1, first, n[l])) : zero();
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        acc[r][l] = fma(part[i][r][l], d, acc[r][l]);
        if (Block::kScales == 2) acc[r][l] = fma(set1(sums[r * blocks + b + i]), m, acc[r][l]);
      }
    }
  }
}

// to[m * kGroupRows + lane], kLanes Vecs of lanes from `lane` of rows [m, m + kRows) of x.
template <int kRows, int kLanes, int kBlocks, class Block>
inline void dot_lanes(const Group<Block>& group, const LinearCall& call, const float* sums,
                      int64_t lane, float* to) {
  const int64_t blocks = call.K / kBlockWeights;
  int64_t n[kLanes];
  Vec acc[kRows][kLanes];
  for (int l = 0; l < kLanes; ++l) {
    n[l] = min_of(W, group.rows - lane - l * W);
    for (int r = 0; r < kRows; ++r) acc[r][l] = zero();
  }
  int64_t b = 0;
  for (; b + kBlocks <= blocks; b += kBlocks) {
    add_blocks<kRows, kLanes, kBlocks>(group, call, sums, b, lane, n, acc);
  }
  for (; b < blocks; ++b) add_blocks<kRows, kLanes, 1>(group, call, sums, b, lane, n, acc);
  for (int r = 0; r < kRows; ++r) {
    for (int l = 0; l < kLanes; ++l) {
      store_up_to(to + r * kGroupRows + lane + l * W, acc[r][l], n[l]);
    }
  }
}

// to[m * kGroupRows + lane] = x[m] . the lanes of kLanes Vecs, for all m
template <int kLanes, class Block>
inline void dot_all_rows(const Group<Block>& group, const LinearCall& call, const PlainRows& rows,
                         int64_t lane, float* to) {
  LinearCall part = call;
  const float* sums = rows.sums;
  int64_t m = 0;
  const auto take = [&]<int kRows, int kBlocks>(std::integral_constant<int, kRows>,
                                                std::integral_constant<int, kBlocks>) {
    dot_lanes<kRows, kLanes, kBlocks>(group, part, sums, lane, to + m * kGroupRows);
    part.x += kRows * call.x_stride;
    sums += kRows * (call.K / kBlockWeights);
    m += kRows;
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  while (m + kFloatRows <= call.M) take(std::integral_constant<int, kFloatRows>(), one);
  while (m + 2 <= call.M) take(two, one);
  if (m < call.M) take(one, two);
}

// to[m * kGroupRows + lane] = x[m] . the group's row `lane`
template <class Block>
inline void dot_group(const Group<Block>& group, const LinearCall& call, const PlainRows& rows,
                      float* to) {
  int64_t lane = 0;
  for (; lane + W < group.rows; lane += 2 * W) dot_all_rows<2>(group, call, rows, lane, to);
  for (; lane < group.rows; lane += W) dot_all_rows<1>(group, call, rows, lane, to);
}
