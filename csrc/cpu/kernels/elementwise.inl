// The activations, rotary embedding, sums over ranks, argmax, conversions.

inline Vec sigmoid(Vec x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

// Abramowitz & Stegun 7.1.26: |error| <= 1.5e-7, for x >= 0.
inline Vec erf_of_positive(Vec x) {
  const Vec t = div(set1(1.0f), fma(set1(0.3275911f), x, set1(1.0f)));
  Vec p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  return sub(set1(1.0f), mul(mul(p, t), exp(sub(zero(), mul(x, x)))));
}

inline Vec activate(Activation act, Vec x) {
  switch (act) {
    case Activation::silu: return div(x, add(set1(1.0f), exp(sub(zero(), x))));
    case Activation::gelu_tanh: {
      // 0.5 (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
      const Vec inner = mul(x, fma(mul(x, x), set1(0.044715f), set1(1.0f)));
      return mul(x, sigmoid(mul(inner, set1(1.5957691216f))));
    }
    case Activation::gelu: {
      // 0.5 x (1 + erf(x / sqrt 2)) = 0.5 (x + |x| erf(|x| / sqrt 2))
      const Vec magnitude = max(x, sub(zero(), x));
      const Vec erf = erf_of_positive(mul(magnitude, set1(0.70710678118f)));
      return mul(set1(0.5f), fma(magnitude, erf, x));
    }
    case Activation::relu: return max(x, zero());
    default: return x;
  }
}

void rope(float* x, const float* cos, const float* sin, int64_t rotary) {
  const int64_t half = rotary / 2;
  for_each_vec(half, [&](int64_t i, int64_t n) {
    const Vec low = load_up_to(x + i, n), high = load_up_to(x + half + i, n);
    const Vec c = load_up_to(cos + i, n), s = load_up_to(sin + i, n);
    store_up_to(x + i, sub(mul(low, c), mul(high, s)), n);
    store_up_to(x + half + i, fma(high, c, mul(low, s)), n);
  });
}

void add_parts(float* x, const float* const* parts, int64_t count, const float* bias, int64_t n) {
  for_each_vec(n, [&](int64_t i, int64_t left) {
    Vec total = load_up_to(parts[0] + i, left);
    for (int64_t r = 1; r < count; ++r) total = add(total, load_up_to(parts[r] + i, left));
    if (bias != nullptr) total = add(total, load_up_to(bias + i, left));
    store_up_to(x + i, add(load_up_to(x + i, left), total), left);
  });
}

int64_t argmax(const float* x, int64_t n) {
  Vec best = set1(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + W <= n; i += W) best = max(best, load(x + i));
  float largest = lane_max(best);
  for (; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  for (i = 0; i < n; ++i) {
    if (x[i] == largest) return i;
  }
  return 0;
}

void scale(float* x, float factor, int64_t n) {
  for_each_vec(n, [&](int64_t i, int64_t left) {
    store_up_to(x + i, mul(load_up_to(x + i, left), set1(factor)), left);
  });
}

template <class T>
inline void widen_all(const T* from, int64_t n, float* to) {
  for_each_vec(
      n, [&](int64_t i, int64_t left) { store_up_to(to + i, load_up_to(from + i, left), left); });
}

template <class T>
inline void narrow_all(const float* from, int64_t n, T* to) {
  for_each_vec(
      n, [&](int64_t i, int64_t left) { store_up_to(to + i, load_up_to(from + i, left), left); });
}

void to_float(const void* from, Precision precision, int64_t n, float* to) {
  switch (precision) {
    case Precision::f32: std::memcpy(to, from, size_t(n) * sizeof(float)); break;
    case Precision::bf16: widen_all(static_cast<const BFloat16*>(from), n, to); break;
    case Precision::f16: widen_all(static_cast<const Half*>(from), n, to); break;
    case Precision::i8: widen_all(static_cast<const int8_t*>(from), n, to); break;
    default: __builtin_unreachable();
  }
}

void weight_row(const Weight& weight, int64_t n, int64_t K, float* to) {
  if (in_blocks(weight.precision)) {
    return with_block(weight.precision, [&]<class Block>(const Block*) {
      open_row<Block>(weight, weight.first + n, K, to);
    });
  }
  const auto* row =
      static_cast<const unsigned char*>(weight.data) + n * bytes_of(weight.precision, K);
  to_float(row, weight.precision, K, to);
  if (weight.scale != nullptr) scale(to, weight.scale[n], K);
}

void from_float(const float* from, Precision precision, int64_t n, void* to) {
  switch (precision) {
    case Precision::f32: std::memcpy(to, from, size_t(n) * sizeof(float)); break;
    case Precision::bf16: narrow_all(from, n, static_cast<BFloat16*>(to)); break;
    case Precision::f16: narrow_all(from, n, static_cast<Half*>(to)); break;
    default: __builtin_unreachable();
  }
}
