// RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016) of one row, statistics in fp32.

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  Vec squares = zero();
  for_each_vec(n, [&](int64_t i, int64_t left) {
    const Vec a = load_up_to(x + i, left);
    squares = fma(a, a, squares);
  });
  const Vec factor = set1(1.0f / __builtin_sqrtf(sum(squares) / float(n) + eps));
  for_each_vec(n, [&](int64_t i, int64_t left) {
    store_up_to(y + i, mul(mul(load_up_to(x + i, left), factor), load_up_to(weight + i, left)),
                left);
  });
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                float* y) {
  Vec total = zero();
  for_each_vec(n, [&](int64_t i, int64_t left) { total = add(total, load_up_to(x + i, left)); });
  const float mean = sum(total) / float(n);
  float squares = 0.0f;
  Vec spread = zero();
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Vec d = sub(load(x + i), set1(mean));
    spread = fma(d, d, spread);
  }
  // The lanes past the end would count as -mean each, so the rest goes one by one.
  for (; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const Vec factor = set1(1.0f / __builtin_sqrtf((sum(spread) + squares) / float(n) + eps));
  for_each_vec(n, [&](int64_t j, int64_t left) {
    Vec a =
        mul(mul(sub(load_up_to(x + j, left), set1(mean)), factor), load_up_to(weight + j, left));
    if (bias != nullptr) a = add(a, load_up_to(bias + j, left));
    store_up_to(y + j, a, left);
  });
}
