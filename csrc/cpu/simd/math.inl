// Walking an array by vectors, exp and tanh, of whatever Vec is. Included after a fragment that says so.

template <class F>
inline void for_each_vec(int64_t n, F body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, int64_t(W));
  if (i < n) body(i, n - i);
}

template <class T>
inline Vec load_up_to(const T* p, int64_t n) {
  return n == W ? load(p) : load_part(p, n);
}
template <class T>
inline void store_up_to(T* p, Vec a, int64_t n) {
  n == W ? store(p, a) : store_part(p, a, n);
}

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, with r's series to degree 7: relative error
// under 2e-7. Below -104 the result is 0, as exp(-inf) must be for masked scores; above 88.7 it grows to
// infinity. NaN is not kept.
inline Vec exp(Vec x) {
  const Vec clamped = max(min(x, set1(89.0f)), set1(-104.0f));
  const Vec n = nearest(mul(clamped, set1(1.44269504088896f)));
  Vec r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9841270e-4f);
  p = fma(p, r, set1(1.3888889e-3f));
  p = fma(p, r, set1(8.3333333e-3f));
  p = fma(p, r, set1(4.1666667e-2f));
  p = fma(p, r, set1(1.6666667e-1f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return scale_by_power(p, n);
}

// tanh: z + z^3 P(z^2) below 5/8, P of degree 4 (Moshier 1989, Cephes, tanhf), else 1 - 2 / (exp(2 |z|) + 1) with
// z's sign; within 2 roundings. Infinities give +-1, -0 gives -0, and NaN NaN.
inline Vec tanh(Vec z) {
  const Vec magnitude = max(z, sub(zero(), z));
  const Vec square = mul(z, z);
  Vec p = set1(-5.70498872745e-3f);
  p = fma(p, square, set1(2.06390887954e-2f));
  p = fma(p, square, set1(-5.37397155531e-2f));
  p = fma(p, square, set1(1.33314422036e-1f));
  p = fma(p, square, set1(-3.33332819422e-1f));
  const Vec near = fma(mul(p, square), z, z);
  Vec far = sub(set1(1.0f), div(set1(2.0f), add(exp(add(magnitude, magnitude)), set1(1.0f))));
  // Beyond 10 it is 1; min keeps the second argument of a NaN.
  far = select_less(magnitude, set1(10.0f), far, min(set1(1.0f), magnitude));
  far = select_less(z, zero(), sub(zero(), far), far);
  return select_less(magnitude, set1(0.625f), near, far);
}
