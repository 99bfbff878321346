// y = epilogue(x W^T) for many rows, as fast as the multipliers go.
//
// x is packed once a call into tiles of kTileRows rows; W in blocks of panels, 2 W outputs wide, that
// stay in the second-level cache while all tiles of x pass by. With a gate, a panel holds W outputs of
// `weight` beside the same W outputs of `up`, so act(gate) * up is done in registers.

int64_t block_linear_bytes(int64_t M, int64_t K) {
  return packed_rows_bytes(M, K) + max_of(kPackedWeightBytes, 2 * W * K * 4) + W * K * 4;
}

template <class Dot>
inline void pack_weight(const Weight& weight, int64_t n, int64_t rows, int64_t K, float* opened,
                        float* to) {
  const int64_t at = n * K;
  switch (weight.precision) {
    case Precision::f32:
      return pack_rows<Dot>(static_cast<const float*>(weight.data) + at, K, rows, K, to, 2 * W);
    case Precision::bf16:
      return pack_rows<Dot>(static_cast<const BFloat16*>(weight.data) + at, K, rows, K, to, 2 * W);
    case Precision::f16:
      return pack_rows<Dot>(static_cast<const Half*>(weight.data) + at, K, rows, K, to, 2 * W);
    case Precision::i8:
      return pack_rows<Dot>(static_cast<const int8_t*>(weight.data) + at, K, rows, K, to, 2 * W);
    default:
      if (rows > 0 && (weight.first + n) % W == 0) {
        return with_block(weight.precision, [&]<class Block>(const Block*) {
          pack_group<Dot, Block>(weight, weight.first + n, rows, K, to, 2 * W);
        });
      }
      // Cut across a group.
      for (int64_t row = 0; row < rows; ++row) weight_row(weight, n + row, K, opened + row * K);
      return pack_rows<Dot>(opened, K, rows, K, to, 2 * W);
  }
}

template <class Dot>
inline void block_linear_with(const LinearCall& call) {
  const bool gated = call.up.data != nullptr;
  // Outputs a panel holds, and panels a block.
  const int64_t width = gated ? W : 2 * W;
  const int64_t units = ceil_div(call.K, Dot::kPerUnit);
  const int64_t panel = units * 2 * W;
  const int64_t panels = max_of(1, kPackedWeightBytes / max_of(1, panel * 4));
  float* rows = static_cast<float*>(call.workspace);
  float* weights = rows + packed_rows_bytes(call.M, call.K) / 4;
  float* opened = weights + max_of(kPackedWeightBytes / 4, panel);
  for (int64_t m = 0; m < call.M; m += kTileRows) {
    pack_rows<Dot>(call.x + m * call.x_stride, call.x_stride, min_of(kTileRows, call.M - m), call.K,
                   rows + m * units, kTileRows);
  }
  for (int64_t block = call.begin; block < call.end; block += panels * width) {
    const int64_t block_end = min_of(call.end, block + panels * width);
    for (int64_t n = block; n < block_end; n += width) {
      float* to = weights + (n - block) / width * panel;
      const int64_t left = block_end - n;
      pack_weight<Dot>(call.weight, n, min_of(W, left), call.K, opened, to);
      if (gated) {
        pack_weight<Dot>(call.up, n, min_of(W, left), call.K, opened, to + W);
      } else {
        pack_weight<Dot>(call.weight, n + W, max_of(0, min_of(W, left - W)), call.K, opened,
                         to + W);
      }
    }
    for (int64_t m = 0; m < call.M; m += kTileRows) {
      const int64_t tile = min_of(kTileRows, call.M - m);
      for (int64_t n = block; n < block_end; n += width) {
        Vec acc[kTileRows][2];
        for (auto& row : acc) row[0] = row[1] = zero();
        register_tile<Dot>(tile, rows + m * units, weights + (n - block) / width * panel, 2 * W,
                           units, acc);
        const int64_t left = block_end - n;
        for (int64_t i = 0; i < tile; ++i) {
          finish(call, acc[i][0], acc[i][1], m + i, n, min_of(W, left));
          if (!gated && left > W)
            finish(call, acc[i][1], zero(), m + i, n + W, min_of(W, left - W));
        }
      }
    }
  }
}

void block_linear(const LinearCall& call) {
#if defined(PYPARALLEL_BYTE_DOT)
  if (fits_fixed_point(call)) {
    return with_block(call.weight.precision,
                      [&]<class Block>(const Block*) { fixed_linear<Block>(call); });
  }
#endif
#if defined(PYPARALLEL_BF16_DOT)
  if (call.bf16_compute) return block_linear_with<Bf16Dot>(call);
#endif
  block_linear_with<FloatDot>(call);
}
