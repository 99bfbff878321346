// y = epilogue(x W^T) for few rows: as fast as W can be read.
//
// W stays row-major, as the model holds it, and is read as kStreams streams that lie far apart: each is a
// run of whole rows, read from its first byte to its last, as prefetchers like it. On Zen 4 that reads
// 30 GB/s a core, where four rows that lie side by side, read together, give half of it: their streams
// overtake each other. Four chains of sums are also what hides the latency of an fma. With a gate two
// of the streams are the gate's. Each sum is one chain over k in any tile, so its bits do not depend on M.

template <int kRows, int kColumns>
inline void store_sums(const Vec (&acc)[kRows][kColumns], float* sums) {
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) sums[(m * kStreams + n) * W] = sum(acc[m][n]);
  }
}

// sums[(m * kStreams + n) * W] = x[m] . w[n]
template <int kRows, int kColumns, class T>
inline void dot_rows(const float* x, int64_t x_stride, const T* const* w, int64_t K, float* sums) {
  Vec acc[kRows][kColumns];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) acc[m][n] = zero();
  }
  const auto step = [&](int64_t k, auto load_from) {
    Vec weights[kColumns];
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) weights[n] = load_from(w[n] + k);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec a = load_from(x + m * x_stride + k);
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) acc[m][n] = fma(a, weights[n], acc[m][n]);
    }
  };
  int64_t k = 0;
  for (; k + 4 * W <= K; k += 4 * W) {
    // A stream runs on through its following rows.
#pragma GCC unroll 16
    for (size_t at = 0; at < 4 * W * sizeof(T); at += 64) {
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) {
        __builtin_prefetch(reinterpret_cast<const char*>(w[n] + k) + at + kPrefetchBytes, 0, 2);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) step(k + i * W, [](const auto* p) { return load(p); });
  }
  for (; k + W <= K; k += W) step(k, [](const auto* p) { return load(p); });
  if (k < K) step(k, [&](const auto* p) { return load_part(p, K - k); });
  store_sums(acc, sums);
}

// All rows of x against one row of each stream.
template <class T>
inline void dot_streams(const LinearCall& call, const T* const* w, float* sums) {
  int64_t m = 0;
  for (; m + kThinRows <= call.M; m += kThinRows) {
    for (int n = 0; n < kStreams; n += kThinColumns) {
      dot_rows<kThinRows, kThinColumns>(call.x + m * call.x_stride, call.x_stride, w + n, call.K,
                                        sums + (m * kStreams + n) * W);
    }
  }
  for (; m < call.M; ++m) {
    dot_rows<1, kStreams>(call.x + m * call.x_stride, call.x_stride, w, call.K,
                          sums + m * kStreams * W);
  }
}

template <class T>
inline void thin_linear_of(const LinearCall& call) {
  alignas(64) float sums[kMaxThinRows * kStreams * W];
  const bool gated = call.up.data != nullptr;
  const T* const weight = static_cast<const T*>(call.weight.data);
  const T* const up = static_cast<const T*>(call.up.data);
  const ThinStreams streams(call);
  const int per_run = streams.per_run;
  for (int64_t i = 0; i < streams.length; i += W) {
    const int64_t rows = min_of(W, streams.length - i);
    for (int64_t j = 0; j < rows; ++j) {
      const T* w[kStreams];
      for (int s = 0; s < kStreams; ++s) {
        const T* const matrix = gated && s % 2 == 1 ? up : weight;
        w[s] = matrix + streams.output(s, i + j) * call.K;
      }
      dot_streams(call, w, sums + j);
    }
    for (int s = 0; s < kStreams; s += per_run) {
      const int64_t n = call.begin + s / per_run * streams.length + i;
      const int64_t count = min_of(rows, call.end - n);
      if (count <= 0) break;
      for (int64_t m = 0; m < call.M; ++m) {
        const float* from = sums + (m * kStreams + s) * W;
        finish(call, load_up_to(from, count), gated ? load_up_to(from + W, count) : zero(), m, n,
               count);
      }
    }
  }
}

void thin_linear(const LinearCall& call) {
  switch (call.weight.precision) {
    case Precision::f32: return thin_linear_of<float>(call);
    case Precision::bf16: return thin_linear_of<BFloat16>(call);
    case Precision::f16: return thin_linear_of<Half>(call);
    case Precision::i8: return thin_linear_of<int8_t>(call);
    default:
      with_block(call.weight.precision,
                 [&]<class Block>(const Block*) { thin_linear_of_blocks<Block>(call); });
  }
}
