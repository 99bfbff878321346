// y = epilogue(x W^T) for many rows, W in blocks, on the dot product of bytes (gguf_fixed_point.inl).
//
// x is fixed once a call, in tiles of kFixedRows rows; W is opened into panels of two groups, which stay in
// the second-level cache while all tiles pass by. With a gate, a panel is a group of `weight` beside the
// same rows of `up`. Both sums, of integers and over blocks, are held in registers.

constexpr int kFixedRows = 6;

// A block of two groups.
template <class Block>
struct alignas(64) PanelBlock {
  __m512i q[8][2];
  __m512 scale[Block::kScales][2];
};

template <class Block>
inline void open_panel(const Group<Block> (&groups)[2], int64_t blocks, PanelBlock<Block>* to) {
  for (int64_t b = 0; b < blocks; ++b) {
    for (int g = 0; g < 2; ++g) {
      // Past the last row there is no group.
      __m512i q[8] = {};
      if (groups[g].rows > 0) FixedPoint<Block>::open(groups[g], b, q);
      for (int j = 0; j < 8; ++j) to[b].q[j][g] = q[j];
      for (int i = 0; i < Block::kScales; ++i) {
        to[b].scale[i][g] =
            groups[g].rows > 0 ? groups[g].scale(b, i, 0, W).v : _mm512_setzero_ps();
      }
    }
  }
}

// to[r] = x's row r of the tile, [blocks, kFixedRows], times the panel.
template <class Block>
inline void fixed_tile(const FixedBlock* x, const PanelBlock<Block>* panel, int64_t blocks,
                       Vec (&to)[kFixedRows][2]) {
  using Fixed = FixedPoint<Block>;
  constexpr int R = kFixedRows;
  __m512 acc[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
#pragma GCC unroll 1
  for (int64_t b = 0; b < blocks; ++b, ++panel, x += R) {
    __m512i c[R][2] = {};
    const auto multiply = [&](int piece) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const __m512i q0 = panel->q[j][0], q1 = panel->q[j][1];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m512i four = x[r].four(piece, j);
          c[r][0] = _mm512_dpbusd_epi32(c[r][0], q0, four);
          c[r][1] = _mm512_dpbusd_epi32(c[r][1], q1, four);
        }
      }
    };
    // c = c 256, or nothing, + where the next sum starts.
    const auto go_on = [&](bool keep, int32_t FixedBlock::* start) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i from =
            Fixed::kTooMuch != 0 ? _mm512_set1_epi32(x[r].*start) : _mm512_setzero_si512();
#pragma GCC unroll 2
        for (int g = 0; g < 2; ++g) {
          c[r][g] = keep ? _mm512_slli_epi32(c[r][g], 8) : _mm512_setzero_si512();
          if (Fixed::kTooMuch != 0) c[r][g] = _mm512_add_epi32(c[r][g], from);
        }
      }
    };
    // acc += c d s factor
    const auto add = [&](float factor) {
      const __m512 d0 = panel->scale[0][0], d1 = panel->scale[0][1];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512 s = _mm512_set1_ps(x[r].scale * factor);
        acc[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[r][0]), _mm512_mul_ps(d0, s), acc[r][0]);
        acc[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[r][1]), _mm512_mul_ps(d1, s), acc[r][1]);
      }
    };
    multiply(0);
    go_on(true, &FixedBlock::high);
    multiply(1);
    if (Fixed::kSplit) add(256);
    go_on(!Fixed::kSplit, &FixedBlock::low);
    multiply(2);
    add(1);
    if (Fixed::kMinimum) {
      const __m512 m0 = panel->scale[Block::kScales - 1][0],
                   m1 = panel->scale[Block::kScales - 1][1];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512 sum = _mm512_set1_ps(x[r].sum);
        acc[r][0] = _mm512_fmadd_ps(sum, m0, acc[r][0]);
        acc[r][1] = _mm512_fmadd_ps(sum, m1, acc[r][1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    to[r][0] = {acc[r][0]};
    to[r][1] = {acc[r][1]};
  }
}

// x's rows as tiles [M / kFixedRows, blocks, kFixedRows]; rows past the last are zeros.
template <class Block>
inline void fix_tiles(const LinearCall& call, int64_t blocks, FixedBlock* to) {
  for (int64_t m = 0; m < round_up(call.M, kFixedRows); ++m) {
    FixedBlock* row = to + m / kFixedRows * kFixedRows * blocks + m % kFixedRows;
    for (int64_t b = 0; b < blocks; ++b) {
      if (m < call.M) {
        FixedPoint<Block>::fix(call.x + m * call.x_stride + b * kBlockWeights, row[b * kFixedRows]);
      } else {
        std::memset(&row[b * kFixedRows], 0, sizeof(FixedBlock));
      }
    }
  }
}

// Whole groups only: see fits_fixed_point.
template <class Block>
inline void fixed_linear(const LinearCall& call) {
  const bool gated = call.up.data != nullptr;
  const int64_t width = gated ? kGroupRows : 2 * kGroupRows;
  const int64_t blocks = call.K / kBlockWeights;
  const int64_t panels =
      max_of(1, kPackedWeightBytes / max_of(1, blocks * int64_t(sizeof(PanelBlock<Block>))));
  FixedBlock* rows = static_cast<FixedBlock*>(call.workspace);
  auto* opened = reinterpret_cast<PanelBlock<Block>*>(static_cast<unsigned char*>(call.workspace) +
                                                      packed_rows_bytes(call.M, call.K));
  fix_tiles<Block>(call, blocks, rows);
  for (int64_t from = call.begin; from < call.end; from += panels * width) {
    const int64_t to = min_of(call.end, from + panels * width);
    for (int64_t n = from; n < to; n += width) {
      const int64_t row = call.weight.first + n;
      const Group<Block> one(call.weight, row, call.K);
      const Group<Block> other = gated ? Group<Block>(call.up, call.up.first + n, call.K)
                                       : Group<Block>(call.weight, row + kGroupRows, call.K);
      open_panel<Block>({one, other}, blocks, opened + (n - from) / width * blocks);
    }
    for (int64_t m = 0; m < call.M; m += kFixedRows) {
      const int64_t tile = min_of(kFixedRows, call.M - m);
      for (int64_t n = from; n < to; n += width) {
        Vec acc[kFixedRows][2];
        fixed_tile<Block>(rows + m * blocks, opened + (n - from) / width * blocks, blocks, acc);
        const int64_t left = to - n;
        for (int64_t i = 0; i < tile; ++i) {
          finish(call, acc[i][0], acc[i][1], m + i, n, min_of(W, left));
          if (!gated && left > W)
            finish(call, acc[i][1], zero(), m + i, n + W, min_of(W, left - W));
        }
      }
    }
  }
}

// bf16's own dot product is faster where x counts as bf16.
inline bool fits_fixed_point(const LinearCall& call) {
  const auto whole = [&](const Weight& w) {
    return w.data == nullptr || (w.first + call.begin) % kGroupRows == 0;
  };
  return in_blocks(call.weight.precision) && !call.bf16_compute && whole(call.weight) &&
         whole(call.up);
}
