// GGUF's blocks of 32 weights, as the kernels keep and open them.
//
//   q4_0: w = d (q - 8)     q4_1: w = d q + m     q8_0: w = d q
//
// d and m are fp16; of a byte of q4 the low nibble is weight j and the high one weight 16 + j. A file holds
// a row's blocks one after another. In memory the blocks of kGroupRows rows are woven, so that one register
// holds the same four (or, of q4, eight) weights of all these rows, and a matrix is one run of bytes
// (pyparallel/cut/quantize.py, weave_blocks_). Of the b-th blocks of g rows:
//
//   d [g], of q4_1 then m [g], then words [kWords, g] of 4 bytes
//
// A matrix's last group is of the rows that are left, so the whole has the bytes of the file.

struct BlockQ4_0 {
  static constexpr int kScales = 1, kWords = 4, kBits = 4, kBias = 8;
};
struct BlockQ4_1 {
  static constexpr int kScales = 2, kWords = 4, kBits = 4, kBias = 0;
};
struct BlockQ8_0 {
  static constexpr int kScales = 1, kWords = 8, kBits = 8, kBias = 0;
};

template <class Block>
struct Group {
  static constexpr int kRowBytes = 2 * Block::kScales + 4 * Block::kWords;

  // That of the row, which is kGroupRows' multiple.
  Group(const Weight& weight, int64_t row, int64_t K)
      : data(static_cast<const uint8_t*>(weight.data) + row * (K / kBlockWeights * kRowBytes)),
        rows(max_of(0, min_of(kGroupRows, weight.rows - row))) {}

  const uint8_t* block(int64_t b) const { return data + b * rows * kRowBytes; }
  const Half* scales(int64_t b, int i) const {
    return reinterpret_cast<const Half*>(block(b)) + i * rows;
  }
  // Of up to n rows from `lane` on; 0 past the last.
  Vec scale(int64_t b, int i, int64_t lane, int64_t n) const {
    const Half* at = scales(b, i) + lane;
    return lane + n <= rows && n == W ? load(at) : load_part(at, min_of(n, rows - lane));
  }
  const uint8_t* words(int64_t b, int i) const {
    return block(b) + rows * (2 * Block::kScales + 4 * i);
  }

  const uint8_t* data;
  int64_t rows;
};

// body(block), a null pointer of the precision's block.
template <class Body>
inline void with_block(Precision precision, Body body) {
  switch (precision) {
    case Precision::q4_0: return body(static_cast<const BlockQ4_0*>(nullptr));
    case Precision::q4_1: return body(static_cast<const BlockQ4_1*>(nullptr));
    default: return body(static_cast<const BlockQ8_0*>(nullptr));
  }
}

// A row in fp32, each weight rounded once.
template <class Block>
inline void open_row(const Weight& weight, int64_t row, int64_t K, float* to) {
  const int64_t lane = row % kGroupRows;
  const Group<Block> group(weight, row - lane, K);
  for (int64_t b = 0; b < K / kBlockWeights; ++b, to += kBlockWeights) {
    int8_t q[kBlockWeights];
    for (int j = 0; j < Block::kWords; ++j) {
      uint8_t bytes[4];
      std::memcpy(bytes, group.words(b, j) + 4 * lane, 4);
      for (int i = 0; i < 4; ++i) {
        q[4 * j + i] = int8_t(Block::kBits == 4 ? (bytes[i] & 15) - Block::kBias : bytes[i]);
        if (Block::kBits == 4) q[16 + 4 * j + i] = int8_t((bytes[i] >> 4) - Block::kBias);
      }
    }
    const Vec d = set1(widen(group.scales(b, 0)[lane]));
    const Vec m =
        Block::kScales == 2 ? set1(widen(group.scales(b, Block::kScales - 1)[lane])) : zero();
    for (int i = 0; i < kBlockWeights; i += W) store(to + i, fma(load(q + i), d, m));
  }
}

// W rows from `row` on, all of one group, as pack_rows has them: into to[unit * to_stride + lane].
template <class Dot, class Block>
inline void pack_group(const Weight& weight, int64_t row, int64_t n, int64_t K, float* to,
                       int64_t to_stride) {
  const int64_t lane = row % kGroupRows;
  const Group<Block> group(weight, row - lane, K);
  for (int64_t b = 0; b < K / kBlockWeights; ++b) {
    const Vec d = group.scale(b, 0, lane, n);
    const Vec m = Block::kScales == 2 ? group.scale(b, Block::kScales - 1, lane, n) : zero();
    const auto pair = [&](const Words& words, int low, int high, int64_t k) {
      const auto weight_at = [&](int field) {
        Vec q = signed_field(words, 32 - Block::kBits * (field + 1), 32 - Block::kBits);
        // q4 are unsigned, and come as q - 8.
        if (Block::kBits == 4 && Block::kBias == 0) q = add(q, set1(8));
        return fma(q, d, m);
      };
      Dot::store_units(to + (b * kBlockWeights + k) / Dot::kPerUnit * to_stride, to_stride,
                       weight_at(low), weight_at(high));
    };
    for (int j = 0; j < Block::kWords; ++j) {
      const Words words =
          load_words(group.words(b, j) + 4 * lane, n, Block::kBits == 4 ? 0x88888888u : 0u);
      if (Block::kBits == 8) {
        pair(words, 0, 1, 4 * j);
        pair(words, 2, 3, 4 * j + 2);
      } else {
        for (int high = 0; high < 2; ++high) {
          pair(words, high, 2 + high, 16 * high + 4 * j);
          pair(words, 4 + high, 6 + high, 16 * high + 4 * j + 2);
        }
      }
    }
  }
}
