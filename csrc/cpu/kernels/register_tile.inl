// The inner loop of every blocked product: acc[rows, 2 W] += A[rows, units] B[units, 2 W], held in
// registers (Goto & van de Geijn 2008, section 6, with both operands packed).
//
// A unit is 32 bits along the summed axis: one float, or two bf16 for the bf16 dot product, whose pairs
// are summed in fp32. A is packed [units, kTileRows], or lies otherwise: one value is broadcast per row. B is
// packed [units, 2 W], or any matrix of floats whose rows lie `b_stride` units apart.

struct FloatDot {
  static constexpr int kPerUnit = 1;
  static inline Vec mac(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  // Two of the summed axis' values, of W rows.
  static inline void store_units(float* to, int64_t stride, Vec a, Vec b) {
    store(to, a);
    store(to + stride, b);
  }
  template <class T>
  static inline Vec load_units(const T* p, int64_t n) {
    return n >= W ? load(p) : load_part(p, n);
  }
};

#if defined(PYPARALLEL_BF16_DOT)
struct Bf16Dot {
  static constexpr int kPerUnit = 2;
  static inline Vec mac(Vec a, Vec b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
  static inline void store_units(float* to, int64_t, Vec a, Vec b) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a.v));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b.v));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static inline Vec load_units(const BFloat16* p, int64_t n) {
    if (n >= 2 * W) return {_mm512_loadu_ps(p)};
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << n) - 1u, p))};
  }
  template <class T>
  static inline Vec load_units(const T* p, int64_t n) {
    const Vec low = n >= W ? load(p) : load_part(p, n);
    const Vec high = n >= 2 * W ? load(p + W) : n > W ? load_part(p + W, n - W) : zero();
    return {(__m512)_mm512_cvtne2ps_pbh(high.v, low.v)};
  }
};
#endif

// A's values lie kUnitStep apart along the summed axis and kRowStep from row to row.
//
// A function of its own in the machine code too: put into a caller that needs registers itself, one of the
// sums was kept in memory, and every step waited for it (42 GFLOP/s of 100 with AVX2 and g++ 12).
template <class Dot, int kRows, int kUnitStep, int kRowStep>
[[gnu::noinline]] void register_tile(const float* a, const float* b, int64_t b_stride,
                                     int64_t units, Vec (&acc)[kTileRows][2]) {
  Vec c[kRows][2];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    c[m][0] = acc[m][0];
    c[m][1] = acc[m][1];
  }
#pragma GCC unroll 1
  for (int64_t u = 0; u < units; ++u) {
    const Vec b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec x = set1(a[m * kRowStep]);
      c[m][0] = Dot::mac(x, b0, c[m][0]);
      c[m][1] = Dot::mac(x, b1, c[m][1]);
    }
    a += kUnitStep;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    acc[m][0] = c[m][0];
    acc[m][1] = c[m][1];
  }
}

// The smallest of three tile heights that holds `rows`, so that a short last tile wastes little.
template <class Dot, int kUnitStep = kTileRows, int kRowStep = 1>
inline void register_tile(int64_t rows, const float* a, const float* b, int64_t b_stride,
                          int64_t units, Vec (&acc)[kTileRows][2]) {
  constexpr int kThird = kTileRows / 3;
  const auto with = [&]<int kRows>(std::integral_constant<int, kRows>) {
    register_tile<Dot, kRows, kUnitStep, kRowStep>(a, b, b_stride, units, acc);
  };
  if (rows > 2 * kThird) return with(std::integral_constant<int, kTileRows>());
  if (rows > kThird) return with(std::integral_constant<int, 2 * kThird>());
  with(std::integral_constant<int, kThird>());
}

// W rows of K values into to[u * to_stride + row]; rows past `rows` become zeros. Whole Vecs are stored.
template <class Dot, class T>
inline void pack_rows(const T* from, int64_t from_stride, int64_t rows, int64_t K, float* to,
                      int64_t to_stride) {
  const int64_t units = ceil_div(K, Dot::kPerUnit);
  for (int64_t u = 0; u < units; u += W) {
    const int64_t left = K - u * Dot::kPerUnit;
    Vec block[W];
    if (rows == W && left >= W * Dot::kPerUnit) {
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) {
        block[r] = Dot::load_units(from + r * from_stride + u * Dot::kPerUnit, W * Dot::kPerUnit);
      }
    } else if (rows == kTileRows && left >= W * Dot::kPerUnit) {
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) {
        block[r] = r < kTileRows ? Dot::load_units(from + r * from_stride + u * Dot::kPerUnit,
                                                   W * Dot::kPerUnit)
                                 : zero();
      }
    } else {
      for (int r = 0; r < W; ++r) {
        block[r] =
            r < rows ? Dot::load_units(from + r * from_stride + u * Dot::kPerUnit, left) : zero();
      }
    }
    transpose(block);
    const int64_t count = min_of(W, units - u);
    for (int64_t i = 0; i < count; ++i) store(to + (u + i) * to_stride, block[i]);
  }
}

// What a thread opens of the weights at once: it stays in the second-level cache.
constexpr int64_t kPackedWeightBytes = 512 * 1024;

// Of M rows of x, packed.
inline int64_t packed_rows_bytes(int64_t M, int64_t units) {
  // Whole Vecs are stored at the end of a tile.
  return round_up((round_up(M, kTileRows) * units + W) * 4, 64);
}
