// Attention of one position over the cache, a part of the keys at a time.
//
// The G query heads of one KV head go together, so each key and value is read once and never expanded
// (GQA, Ainslie et al. 2023). Keys are taken kDecodeKeys at a time with the online softmax; parts of a
// long context are merged afterwards (flash-decoding), in an order fixed by the parts.

constexpr int64_t kDecodeKeys = 64;
// The sums of a pass stay in registers, beside the heads' queries or the Vecs of a value: of kDecodeRows keys,
// or of kDecodeColumns Vecs, by heads.
constexpr int kDecodeHeads = W == 16 ? 4 : 3;
constexpr int kDecodeRows = 4;
constexpr int kDecodeColumns = W == 16 ? 4 : 3;

inline float exp_of(float x) {
  float lanes[W];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

// Row scores [0, count) to weights; returns the factor for O and l.
inline float soften(float* row, int64_t count, float* maximum, float* total) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  Vec largest = set1(*maximum);
  for_each_vec(count, [&](int64_t i, int64_t left) {
    // A partial load would bring zeros into the maximum.
    if (left == W) {
      largest = max(largest, load(row + i));
    } else {
      for (int64_t j = i; j < count; ++j) largest = max(largest, set1(row[j]));
    }
  });
  const float next = lane_max(largest);
  if (next == kNever) {
    std::memset(row, 0, size_t(count) * sizeof(float));
    return 1.0f;
  }
  Vec sums = zero();
  for_each_vec(count, [&](int64_t i, int64_t left) {
    store_up_to(row + i, exp(sub(load_up_to(row + i, left), set1(next))), left);
    sums = add(sums, load_up_to(row + i, left));
  });
  const float factor = exp_of(*maximum - next);
  *maximum = next;
  *total = *total * factor + sum(sums);
  return factor;
}

// Asks for rows that are read next: while keys are multiplied memory is idle, and so it is under values.
template <class T>
inline void fetch_rows(const T* rows, int64_t stride, int64_t count, int64_t D) {
  for (int64_t t = 0; t < count; ++t) {
    const char* row = reinterpret_cast<const char*>(rows + t * stride);
    for (int64_t byte = 0; byte < D * int64_t(sizeof(T)); byte += 64)
      __builtin_prefetch(row + byte, 0, 2);
  }
}

// scores[h, t] = q[h] . keys[t]; past count, up to a multiple of kDecodeRows, the last key's again. Fetches
// as many rows at `next`.
template <class T, int kHeads>
inline void score_keys(const float* q, int64_t q_stride, const T* keys, const T* next,
                       int64_t key_stride, int64_t count, int64_t D, float* scores) {
  for (int64_t t = 0; t < count; t += kDecodeRows) {
    fetch_rows(next + t * key_stride, key_stride, min_of(kDecodeRows, count - t), D);
    const T* key[kDecodeRows];
#pragma GCC unroll 4
    for (int r = 0; r < kDecodeRows; ++r) key[r] = keys + min_of(t + r, count - 1) * key_stride;
    Vec acc[kHeads][kDecodeRows];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
      for (int r = 0; r < kDecodeRows; ++r) acc[h][r] = zero();
    }
    for (int64_t d = 0; d < D; d += W) {
      const int64_t part = min_of(W, D - d);
      Vec x[kHeads];
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) x[h] = load_up_to(q + h * q_stride + d, part);
#pragma GCC unroll 4
      for (int r = 0; r < kDecodeRows; ++r) {
        const Vec k = part == W ? load(key[r] + d) : load_part(key[r] + d, part);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) acc[h][r] = fma(x[h], k, acc[h][r]);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      store_sums(scores + h * kDecodeKeys + t, acc[h][0], acc[h][1], acc[h][2], acc[h][3]);
    }
  }
}

// out[h] = out[h] * factor[h] + sum_t p[h, t] values[t], kColumns Vecs wide; the last may be a part.
template <class T, int kHeads, int kColumns>
inline void add_columns(const float* p, const float* factor, const T* values, const T* next,
                        int64_t key_stride, int64_t count, int64_t D, float* out,
                        int64_t out_stride) {
  const int64_t last = (kColumns - 1) * W, part = D - last;
  Vec acc[kHeads][kColumns];
  const auto each = [&](auto body) {
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c)
        body(h, c, out + h * out_stride + c * W, c + 1 < kColumns ? W : part);
    }
  };
  each([&](int h, int c, const float* at, int64_t n) {
    acc[h][c] = mul(load_up_to(at, n), set1(factor[h]));
  });
  for (int64_t t = 0; t < count; ++t) {
    const T* value = values + t * key_stride;
    fetch_rows(next + t * key_stride, 0, 1, D);
    Vec v[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c + 1 < kColumns; ++c) v[c] = load(value + c * W);
    v[kColumns - 1] = part >= W ? load(value + last) : load_part(value + last, part);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const Vec weight = set1(p[h * kDecodeKeys + t]);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) acc[h][c] = fma(weight, v[c], acc[h][c]);
    }
  }
  each([&](int h, int c, float* at, int64_t n) { store_up_to(at, acc[h][c], n); });
}

// The same for all of D, which fetches as many rows at `next`.
template <class T, int kHeads>
inline void add_values(const float* p, const float* factor, const T* values, const T* next,
                       int64_t key_stride, int64_t count, int64_t D, float* out,
                       int64_t out_stride) {
  for (int64_t d = 0; d < D; d += kDecodeColumns * W) {
    const int64_t left = min_of(kDecodeColumns * W, D - d);
    const auto add = [&](auto columns) {
      add_columns<T, kHeads, columns.value>(p, factor, values + d, next + d, key_stride, count,
                                            left, out + d, out_stride);
    };
    switch (ceil_div(left, W)) {
      case 1: add(std::integral_constant<int, 1>()); break;
      case 2: add(std::integral_constant<int, 2>()); break;
      case 3: add(std::integral_constant<int, 3>()); break;
      default: add(std::integral_constant<int, 4>()); break;
    }
  }
}

template <class T, int kHeads>
inline void attend(const AttentionCall& call, int64_t head, int64_t begin, int64_t end,
                   SoftmaxState state) {
  const float* q = call.q + head * call.q_head_stride;
  float* out = call.out + head * call.out_head_stride;
  float* maximum = state.maximum + head;
  float* total = state.total + head;
  alignas(64) float scores[kHeads * kDecodeKeys];
  float factor[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    maximum[h] = -std::numeric_limits<float>::infinity();
    total[h] = 0.0f;
    std::memset(out + h * call.out_head_stride, 0, size_t(call.D) * sizeof(float));
  }
  for (int64_t t = begin; t < end; t += kDecodeKeys) {
    const int64_t count = min_of(kDecodeKeys, end - t);
    const T* keys = static_cast<const T*>(call.keys) + t * call.key_stride;
    const T* values = static_cast<const T*>(call.values) + t * call.key_stride;
    // A row that is there, where there is no next one.
    const T* next = end - t >= 2 * kDecodeKeys ? keys + kDecodeKeys * call.key_stride : keys;
    score_keys<T, kHeads>(q, call.q_head_stride, keys, values, call.key_stride, count, call.D,
                          scores);
    for (int h = 0; h < kHeads; ++h) {
      factor[h] = soften(scores + h * kDecodeKeys, count, maximum + h, total + h);
    }
    add_values<T, kHeads>(scores, factor, values, next, call.key_stride, count, call.D, out,
                          call.out_head_stride);
  }
}

template <class T>
inline void decode_attention_of(const AttentionCall& call, int64_t begin, int64_t end,
                                SoftmaxState state) {
  for (int64_t head = 0; head < call.G; head += kDecodeHeads) {
    switch (min_of(kDecodeHeads, call.G - head)) {
      case 1: attend<T, 1>(call, head, begin, end, state); break;
      case 2: attend<T, 2>(call, head, begin, end, state); break;
      case 3: attend<T, 3>(call, head, begin, end, state); break;
      default: attend<T, kDecodeHeads>(call, head, begin, end, state); break;
    }
  }
}

void decode_attention(const AttentionCall& call, int64_t begin, int64_t end, SoftmaxState state) {
  switch (call.precision) {
    case Precision::f32: decode_attention_of<float>(call, begin, end, state); break;
    case Precision::bf16: decode_attention_of<BFloat16>(call, begin, end, state); break;
    case Precision::f16: decode_attention_of<Half>(call, begin, end, state); break;
    default: __builtin_unreachable();
  }
}

// With m = max_s m_s: out = sum_s exp(m_s - m) partial_s / sum_s exp(m_s - m) total_s
void merge_attention(const float* partial, int64_t split_stride, SoftmaxState states,
                     int64_t splits, int64_t G, int64_t D, float* out, int64_t out_head_stride) {
  for (int64_t g = 0; g < G; ++g) {
    float largest = states.maximum[g];
    for (int64_t s = 1; s < splits; ++s) {
      const float other = states.maximum[s * G + g];
      largest = other > largest ? other : largest;
    }
    float total = 0.0f;
    float* row = out + g * out_head_stride;
    for (int64_t s = 0; s < splits; ++s) {
      const float factor = exp_of(states.maximum[s * G + g] - largest);
      total += factor * states.total[s * G + g];
      const float* part = partial + s * split_stride + g * D;
      for_each_vec(D, [&](int64_t d, int64_t left) {
        const Vec before = s == 0 ? zero() : load_up_to(row + d, left);
        store_up_to(row + d, fma(load_up_to(part + d, left), set1(factor), before), left);
      });
    }
    scale(row, 1.0f / total, D);
  }
}
