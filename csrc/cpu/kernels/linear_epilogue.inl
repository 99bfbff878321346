// What is done to a matmul's sums before they are stored: scale, bias, activation, gate, residual.

inline Vec with_bias(const Weight& weight, Vec sums, int64_t n, int64_t count) {
  if (weight.scale != nullptr) sums = mul(sums, load_up_to(weight.scale + n, count));
  if (weight.bias != nullptr) sums = add(sums, load_up_to(weight.bias + n, count));
  return sums;
}

// Stores y[m, n .. n + count), count <= W. `gated` are the sums of call.up, where there is one.
inline void finish(const LinearCall& call, Vec sums, Vec gated, int64_t m, int64_t n,
                   int64_t count) {
  Vec a = with_bias(call.weight, sums, n, count);
  if (call.act != Activation::none) a = activate(call.act, a);
  if (call.up.data != nullptr) a = mul(a, with_bias(call.up, gated, n, count));
  if (call.residual != nullptr) {
    a = add(a, load_up_to(call.residual + m * call.residual_stride + n, count));
  }
  store_up_to(call.y + m * call.y_stride + n, a, count);
}
