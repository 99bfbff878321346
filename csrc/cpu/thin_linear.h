// y = epilogue(x W^T) for few rows: as fast as W can be read.
//
// W stays row-major, as the model holds it. One row of x reads it as one stream, a row at a time with a
// prefetch a page ahead: on Zen 5 that reads bf16 at 35 GB/s a core, where four or eight rows of W at
// once read 15 to 25. More rows of x take tiles of kThinRows x kThinColumns sums, so that x is not read
// again for every row of W. Each sum is one chain over k in any tile, so its bits do not depend on M.

constexpr int64_t kThinBlock = 64;
constexpr int64_t kPrefetchBytes = 4096;

// sums[m * kThinBlock + n] = x[m] . w[n]
template <class T, int kRows, int kColumns>
inline void dot_tile(const float* x, int64_t x_stride, const T* w, int64_t K, float* sums) {
  Vec acc[kRows][kColumns];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) acc[m][n] = zero();
  }
  const auto step = [&](int64_t k, auto load_from) {
    Vec weights[kColumns];
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) weights[n] = load_from(w + n * K + k);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec a = load_from(x + m * x_stride + k);
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) acc[m][n] = fma(a, weights[n], acc[m][n]);
    }
  };
  int64_t k = 0;
  for (; k + 4 * W <= K; k += 4 * W) {
    // kColumns rows of 4 Vecs each; the stream runs on through the following rows.
#pragma GCC unroll 16
    for (size_t at = 0; at < 4 * W * sizeof(T); at += 64) {
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) {
        __builtin_prefetch(reinterpret_cast<const char*>(w + n * K + k) + at + kPrefetchBytes);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) step(k + i * W, [](const auto* p) { return load(p); });
  }
  for (; k + W <= K; k += W) step(k, [](const auto* p) { return load(p); });
  if (k < K) step(k, [&](const auto* p) { return load_part(p, K - k); });
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) sums[m * kThinBlock + n] = sum(acc[m][n]);
  }
}

template <class T, int kColumns>
inline void dot_columns(const LinearCall& call, const T* w, float* sums) {
  int64_t m = 0;
  for (; m + kThinRows <= call.M; m += kThinRows) {
    dot_tile<T, kThinRows, kColumns>(call.x + m * call.x_stride, call.x_stride, w, call.K,
                                     sums + m * kThinBlock);
  }
  for (; m < call.M; ++m) {
    dot_tile<T, 1, kColumns>(call.x + m * call.x_stride, call.x_stride, w, call.K, sums + m * kThinBlock);
  }
}

// sums[m, j] of rows n + j of the weight, j < count <= kThinBlock.
template <class T>
inline void dot_block(const LinearCall& call, const Weight& weight, int64_t n, int64_t count, float* sums) {
  const T* w = static_cast<const T*>(weight.data) + n * call.K;
  int64_t j = 0;
  if (call.M > 1) {
    for (; j + kThinColumns <= count; j += kThinColumns) {
      dot_columns<T, kThinColumns>(call, w + j * call.K, sums + j);
    }
  }
  for (; j < count; ++j) dot_columns<T, 1>(call, w + j * call.K, sums + j);
}

inline void dot_block(const LinearCall& call, const Weight& weight, int64_t n, int64_t count, float* sums) {
  switch (weight.precision) {
    case Precision::f32: dot_block<float>(call, weight, n, count, sums); break;
    case Precision::bf16: dot_block<BFloat16>(call, weight, n, count, sums); break;
    case Precision::f16: dot_block<Half>(call, weight, n, count, sums); break;
    case Precision::i8: dot_block<int8_t>(call, weight, n, count, sums); break;
  }
}

void thin_linear(const LinearCall& call) {
  alignas(64) float sums[kMaxThinRows * kThinBlock];
  alignas(64) float gated[kMaxThinRows * kThinBlock];
  for (int64_t n = call.begin; n < call.end; n += kThinBlock) {
    const int64_t count = min_of(kThinBlock, call.end - n);
    dot_block(call, call.weight, n, count, sums);
    if (call.up.data != nullptr) dot_block(call, call.up, n, count, gated);
    for (int64_t m = 0; m < call.M; ++m) {
      for (int64_t j = 0; j < count; j += W) {
        const int64_t part = min_of(W, count - j);
        const float* row = sums + m * kThinBlock + j;
        const float* gate = gated + m * kThinBlock + j;
        finish(call, load_up_to(row, part), call.up.data != nullptr ? load_up_to(gate, part) : zero(), m,
               n + j, part);
      }
    }
  }
}
