// The folds and the copy past the caches, written once over the Vec of a fragment of cpu/simd. Included
// inside the unnamed namespace of a file compiled for one instruction set.

// Up to the first line of dst and after its last whole one, plain copies.
void stream(void* dst, const void* src, int64_t bytes) {
  auto* to = static_cast<char*>(dst);
  const auto* from = static_cast<const char*>(src);
  const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(to) % 64);
  const int64_t head = misaligned == 0 ? 0 : 64 - misaligned;
  if (bytes < head + 64) {
    std::memcpy(to, from, size_t(bytes));
    return;
  }
  const int64_t lines = (bytes - head) / 64 * 64;
  std::memcpy(to, from, size_t(head));
  stream_lines(to + head, from + head, lines);
  std::memcpy(to + head + lines, from + head + lines, size_t(bytes - head - lines));
}

// Sums of float, Half and BFloat16: W elements at a time, all ranks, then the next.
template <class T>
void fold_sum(T* dst, const T* const* source, int ranks, int64_t n) {
  int64_t i = 0;
  if (ranks == 2) {
    const T* first = source[0];
    const T* second = source[1];
    for (; i + 4 * W <= n; i += 4 * W) {
      const Vec a = add(load(first + i), load(second + i));
      const Vec b = add(load(first + i + W), load(second + i + W));
      const Vec c = add(load(first + i + 2 * W), load(second + i + 2 * W));
      const Vec d = add(load(first + i + 3 * W), load(second + i + 3 * W));
      store(dst + i, a);
      store(dst + i + W, b);
      store(dst + i + 2 * W, c);
      store(dst + i + 3 * W, d);
    }
  }
  for (; i + W <= n; i += W) {
    Vec total = load(source[0] + i);
    for (int r = 1; r < ranks; ++r) total = add(total, load(source[r] + i));
    store(dst + i, total);
  }
  if (i < n) {
    Vec total = load_part(source[0] + i, n - i);
    for (int r = 1; r < ranks; ++r) total = add(total, load_part(source[r] + i, n - i));
    store_part(dst + i, total, n - i);
  }
}

// Every other fold: blocks that stay in the first-level cache, one rank after another, in loops the
// compiler vectorises.
template <class Op, class T>
void fold_blocks(T* dst, const T* const* source, int ranks, int64_t n) {
  constexpr int64_t kBlock = 512;
  Accumulator<T> total[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t length = n - begin < kBlock ? n - begin : kBlock;
    const T* first = source[0] + begin;
    for (int64_t i = 0; i < length; ++i) total[i] = widen(first[i]);
    for (int r = 1; r < ranks; ++r) {
      const T* next = source[r] + begin;
      for (int64_t i = 0; i < length; ++i) {
        total[i] = Op::apply(total[i], Accumulator<T>(widen(next[i])));
      }
    }
    for (int64_t i = 0; i < length; ++i) dst[begin + i] = narrow<T>(total[i]);
  }
}

template <class T>
constexpr FoldsOf<T> kVectorSum = {fold_sum<T>, fold_blocks<Max, T>, fold_blocks<Min, T>};
template <class T>
constexpr FoldsOf<T> kBlockSum = {fold_blocks<Sum, T>, fold_blocks<Max, T>, fold_blocks<Min, T>};

constexpr Folds kFolds = {kVectorSum<float>,
                          kVectorSum<Half>,
                          kVectorSum<BFloat16>,
                          kBlockSum<double>,
                          kBlockSum<int32_t>,
                          kBlockSum<int64_t>,
                          stream};
