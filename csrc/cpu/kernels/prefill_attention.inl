// Causal attention of many positions, without the S x S matrix (FlashAttention-2, Dao 2023, algorithm 1).
//
// kQueryBlock positions of all G heads of one KV head go together, so that each block of keys, packed
// for the register tile, serves kQueryBlock * G rows. For each tile of kTileRows rows:
//   S = Q K^T; masked; m' = max(m, rowmax S); P = exp(S - m'); O = exp(m - m') O + P V; l likewise
// and O / l at the end. fp32 throughout.

constexpr int64_t kQueryBlock = 96;
constexpr int64_t kKeyBlock = 128;
// So no maximum stays at -inf, of which exp(-inf + inf) would make NaN.
static_assert(kQueryBlock <= kKeyBlock, "every row sees a key of the first block");
static_assert(kQueryBlock % kTileRows == 0 && kKeyBlock % (2 * W) == 0, "blocks hold whole tiles");

struct PrefillSpace {
  float* q;        // [tiles, D, kTileRows]
  float* out;      // [rows, padded D]
  float* keys;     // [kKeyBlock / 2W, D, 2W]
  float* values;   // [kKeyBlock, padded D]
  float* scores;   // [kTileRows, kKeyBlock]
  float* maximum;  // [rows]
  float* total;    // [rows]
  int64_t padded;
  int64_t bytes;

  PrefillSpace(void* at, int64_t G, int64_t D) : padded(round_up(D, 2 * W)) {
    float* next = static_cast<float*>(at);
    const auto take = [&](int64_t n) {
      float* p = next;
      if (at != nullptr) next += round_up(n, 16);
      bytes += round_up(n, 16) * 4;
      return p;
    };
    bytes = 0;
    const int64_t rows = kQueryBlock * G;
    q = take(rows * D + W);
    out = take(rows * padded);
    keys = take(kKeyBlock * D);
    values = take(kKeyBlock * padded);
    scores = take(kTileRows * kKeyBlock);
    maximum = take(rows);
    total = take(rows);
  }
};

int64_t prefill_attention_bytes(int64_t G, int64_t D) { return PrefillSpace(nullptr, G, D).bytes; }

// scores = Q K^T of one tile; keys past `count` give zeros.
inline void score_tile(const PrefillSpace& s, const float* q, int64_t rows, int64_t count,
                       int64_t D) {
  for (int64_t n = 0; n < count; n += 2 * W) {
    Vec acc[kTileRows][2];
    for (auto& row : acc) row[0] = row[1] = zero();
    register_tile<FloatDot>(rows, q, s.keys + n * D, 2 * W, D, acc);
    for (int64_t i = 0; i < rows; ++i) {
      store(s.scores + i * kKeyBlock + n, acc[i][0]);
      store(s.scores + i * kKeyBlock + n + W, acc[i][1]);
    }
  }
}

// Rows of scores [0, count) to weights, those outside [low + i, high + i) of row i to zero; the factors for O
// and l. As soften, with the rows side by side, so that none waits for another's.
inline void soften_tile(float* scores, int64_t rows, int64_t count, int64_t low, int64_t high,
                        float* maximum, float* total, float* factor) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  static_assert(kTileRows <= W, "a number of each row fits a Vec");
  float next[W] = {};
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * kKeyBlock;
    for (int64_t t = 0; t < min_of(low + i, count); ++t) row[t] = kNever;
    // To whole Vecs, which the scores fill.
    for (int64_t t = max_of(0, high + i); t < round_up(count, W); ++t) row[t] = kNever;
    Vec largest = set1(maximum[i]);
    for (int64_t t = 0; t < count; t += W) largest = max(largest, load(row + t));
    next[i] = lane_max(largest);
  }
  store_part(factor, exp(sub(load_part(maximum, rows), load_part(next, rows))), rows);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * kKeyBlock;
    Vec sums = zero();
    for (int64_t t = 0; t < count; t += W) {
      const Vec weights = exp(sub(load(row + t), set1(next[i])));
      store(row + t, weights);
      sums = add(sums, weights);
    }
    maximum[i] = next[i];
    total[i] = total[i] * factor[i] + sum(sums);
  }
}

// O = factor O + P V of one tile.
inline void add_tile(const PrefillSpace& s, float* out, int64_t rows, const float* factor,
                     int64_t count) {
  for (int64_t d = 0; d < s.padded; d += 2 * W) {
    Vec acc[kTileRows][2];
    for (int64_t i = 0; i < rows; ++i) {
      acc[i][0] = mul(load(out + i * s.padded + d), set1(factor[i]));
      acc[i][1] = mul(load(out + i * s.padded + d + W), set1(factor[i]));
    }
    for (int64_t i = rows; i < kTileRows; ++i) acc[i][0] = acc[i][1] = zero();
    register_tile<FloatDot, 1, kKeyBlock>(rows, s.scores, s.values + d, s.padded, count, acc);
    for (int64_t i = 0; i < rows; ++i) {
      store(out + i * s.padded + d, acc[i][0]);
      store(out + i * s.padded + d + W, acc[i][1]);
    }
  }
}

template <class T>
inline void pack_keys(const AttentionCall& call, const PrefillSpace& s, int64_t begin,
                      int64_t count) {
  const T* keys = static_cast<const T*>(call.keys) + begin * call.key_stride;
  const T* values = static_cast<const T*>(call.values) + begin * call.key_stride;
  for (int64_t n = 0; n < count; n += W) {
    float* panel = s.keys + n / (2 * W) * (2 * W) * call.D + n % (2 * W);
    pack_rows<FloatDot>(keys + n * call.key_stride, call.key_stride, min_of(W, count - n), call.D,
                        panel, 2 * W);
  }
  for (int64_t t = 0; t < count; ++t) {
    widen_all(values + t * call.key_stride, call.D, s.values + t * s.padded);
    for (int64_t d = call.D; d < s.padded; ++d) s.values[t * s.padded + d] = 0.0f;
  }
}

template <class T>
inline void attend_block(const AttentionCall& call, int64_t row, int64_t M, int64_t start,
                         int64_t window) {
  const PrefillSpace s(call.workspace, call.G, call.D);
  const int64_t tiles = ceil_div(M, kTileRows);
  const auto rows_of = [&](int64_t tile) { return min_of(kTileRows, M - tile * kTileRows); };
  for (int64_t g = 0; g < call.G; ++g) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* q =
          call.q + (row + tile * kTileRows) * call.q_row_stride + g * call.q_head_stride;
      pack_rows<FloatDot>(q, call.q_row_stride, rows_of(tile), call.D,
                          s.q + (g * tiles + tile) * call.D * kTileRows, kTileRows);
    }
  }
  const int64_t all = call.G * tiles * kTileRows;
  for (int64_t i = 0; i < all; ++i) {
    s.maximum[i] = -std::numeric_limits<float>::infinity();
    s.total[i] = 0.0f;
  }
  std::memset(s.out, 0, size_t(all * s.padded) * sizeof(float));
  const int64_t first_key = window > 0 ? max_of(0, start + row - window + 1) : 0;
  const int64_t end_key = start + row + M;
  for (int64_t begin = first_key; begin < end_key; begin += kKeyBlock) {
    const int64_t count = min_of(kKeyBlock, end_key - begin);
    pack_keys<T>(call, s, begin, count);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t rows = rows_of(tile);
      const int64_t position = start + row + tile * kTileRows;
      // Keys this tile can see at all: nothing after its last row.
      const int64_t seen = min_of(count, position + rows - begin);
      if (seen <= 0) continue;
      for (int64_t g = 0; g < call.G; ++g) {
        const int64_t at = (g * tiles + tile) * kTileRows;
        float factor[kTileRows];
        score_tile(s, s.q + at * call.D, rows, seen, call.D);
        const int64_t high = position + 1 - begin;
        soften_tile(s.scores, rows, seen, window > 0 ? high - window : -rows, high, s.maximum + at,
                    s.total + at, factor);
        add_tile(s, s.out + at * s.padded, rows, factor, seen);
      }
    }
  }
  for (int64_t g = 0; g < call.G; ++g) {
    for (int64_t i = 0; i < M; ++i) {
      const int64_t at = g * tiles * kTileRows + i;
      float* to = call.out + (row + i) * call.out_row_stride + g * call.out_head_stride;
      std::memcpy(to, s.out + at * s.padded, size_t(call.D) * sizeof(float));
      scale(to, 1.0f / s.total[at], call.D);
    }
  }
}

void prefill_attention(const AttentionCall& call, int64_t M, int64_t start, int64_t window) {
  for (int64_t row = 0; row < M; row += kQueryBlock) {
    const int64_t rows = min_of(kQueryBlock, M - row);
    switch (call.precision) {
      case Precision::f32: attend_block<float>(call, row, rows, start, window); break;
      case Precision::bf16: attend_block<BFloat16>(call, row, rows, start, window); break;
      case Precision::f16: attend_block<Half>(call, row, rows, start, window); break;
      default: __builtin_unreachable();
    }
  }
}
