// Attention of one position over the cache, a part of the keys at a time.
//
// The G query heads of one KV head go together, so each key and value is read once and never expanded
// (GQA, Ainslie et al. 2023). Keys are taken kDecodeKeys at a time with the online softmax; parts of a
// long context are merged afterwards (flash-decoding), in an order fixed by the parts.

constexpr int64_t kDecodeKeys = 64;
constexpr int kDecodeHeads = 4;

inline float exp_of(float x) {
  float lanes[W];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

// scores[h, t] = q[h] . keys[t]
template <class T, int kHeads>
inline void score_keys(const float* q, int64_t q_stride, const T* keys, int64_t key_stride, int64_t count,
                       int64_t D, float* scores) {
  for (int64_t t = 0; t < count; ++t) {
    const T* key = keys + t * key_stride;
    Vec acc[kHeads];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) acc[h] = zero();
    int64_t d = 0;
    for (; d + W <= D; d += W) {
      const Vec k = load(key + d);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) acc[h] = fma(load(q + h * q_stride + d), k, acc[h]);
    }
    if (d < D) {
      const Vec k = load_part(key + d, D - d);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) acc[h] = fma(load_part(q + h * q_stride + d, D - d), k, acc[h]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) scores[h * kDecodeKeys + t] = sum(acc[h]);
  }
}

// out[h] = out[h] * factor[h] + sum_t p[h, t] values[t]
template <class T, int kHeads>
inline void add_values(const float* p, const float* factor, const T* values, int64_t key_stride,
                       int64_t count, int64_t D, float* out, int64_t out_stride) {
  for (int64_t d = 0; d < D; d += W) {
    const int64_t part = min_of(W, D - d);
    Vec acc[kHeads];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      acc[h] = mul(load_up_to(out + h * out_stride + d, part), set1(factor[h]));
    }
    for (int64_t t = 0; t < count; ++t) {
      const T* value = values + t * key_stride + d;
      const Vec v = part == W ? load(value) : load_part(value, part);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) acc[h] = fma(set1(p[h * kDecodeKeys + t]), v, acc[h]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) store_up_to(out + h * out_stride + d, acc[h], part);
  }
}

template <class T, int kHeads>
inline void attend(const AttentionCall& call, int64_t head, int64_t begin, int64_t end, SoftmaxState state) {
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
    score_keys<T, kHeads>(q, call.q_head_stride, static_cast<const T*>(call.keys) + t * call.key_stride,
                          call.key_stride, count, call.D, scores);
    for (int h = 0; h < kHeads; ++h) {
      float* row = scores + h * kDecodeKeys;
      float largest = maximum[h];
      for (int64_t i = 0; i < count; ++i) largest = row[i] > largest ? row[i] : largest;
      Vec sums = zero();
      for_each_vec(count, [&](int64_t i, int64_t left) {
        const Vec p = exp(sub(load_up_to(row + i, left), set1(largest)));
        store_up_to(row + i, p, left);
        // Lanes past the end hold exp(0 - largest); they must not count.
        sums = add(sums, load_up_to(row + i, left));
      });
      factor[h] = exp_of(maximum[h] - largest);
      maximum[h] = largest;
      total[h] = total[h] * factor[h] + sum(sums);
    }
    add_values<T, kHeads>(scores, factor, static_cast<const T*>(call.values) + t * call.key_stride,
                          call.key_stride, count, call.D, out, call.out_head_stride);
  }
}

template <class T>
inline void decode_attention_of(const AttentionCall& call, int64_t begin, int64_t end, SoftmaxState state) {
  for (int64_t head = 0; head < call.G; head += kDecodeHeads) {
    switch (min_of(kDecodeHeads, call.G - head)) {
      case 1: attend<T, 1>(call, head, begin, end, state); break;
      case 2: attend<T, 2>(call, head, begin, end, state); break;
      case 3: attend<T, 3>(call, head, begin, end, state); break;
      default: attend<T, 4>(call, head, begin, end, state); break;
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
void merge_attention(const float* partial, int64_t split_stride, SoftmaxState states, int64_t splits,
                     int64_t G, int64_t D, float* out, int64_t out_head_stride) {
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
