// 16 floats at a time. Included inside the unnamed namespace of a file compiled for AVX-512.

struct Vec {
  __m512 v;
};

constexpr int W = 16;
// The tiles of sums held in registers: block_linear's rows (of 2 W), thin_linear's rows and columns.
constexpr int kTileRows = 12;
constexpr int kThinRows = 4;
constexpr int kThinColumns = 4;

inline __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1u); }

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a < b ? yes : no; no where either is NaN.
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float lane_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

// to[0..3]: the sums of a, b, c and d.
inline void store_sums(float* to, Vec a, Vec b, Vec c, Vec d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 low =
      _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 high =
      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 quads = _mm512_add_ps(low, high);
  const __m512 pairs = _mm512_add_ps(quads, _mm512_shuffle_f32x4(quads, quads, 0x4e));
  const __m128 one = _mm512_castps512_ps128(pairs), other = _mm512_extractf32x4_ps(pairs, 1);
  _mm_storeu_ps(to, _mm_add_ps(one, other));
}

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_part(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store_part(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }

inline Vec widen16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const BFloat16* p) { return widen16(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec load_part(const BFloat16* p, int64_t n) {
  return widen16(_mm256_maskz_loadu_epi16(first(n), p));
}
inline Vec load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline Vec load_part(const Half* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}
inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline Vec load_part(const int8_t* p, int64_t n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}

// Round to nearest even; a NaN stays one.
inline __m256i narrow16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16));
}
inline void store(BFloat16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow16(a)); }
inline void store_part(BFloat16* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow16(a));
}
inline void store(Half* p, Vec a) {
  _mm256_storeu_si256((__m256i*)p,
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_part(Half* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n),
                           _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// W words of 4 bytes, bits flipped; a field of each, signed: what is left between the shifts.
struct Words {
  __m512i v;
};
inline Words load_words(const uint8_t* p, int64_t n, uint32_t flipped) {
  return {_mm512_xor_si512(_mm512_maskz_loadu_epi32(first(n), p), _mm512_set1_epi32(int(flipped)))};
}
inline Vec signed_field(Words a, int left, int right) {
  return {_mm512_cvtepi32_ps(
      _mm512_srai_epi32(_mm512_slli_epi32(a.v, unsigned(left)), unsigned(right)))};
}

// The nearest integer, as a float.
inline Vec nearest(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for integral n in [-150, 128].
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// a[i] lane j to a[j] lane i.
inline void transpose(Vec (&a)[W]) {
  __m512 t[16];
  __m512d u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(a[i].v, a[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(a[i].v, a[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = _mm512_unpacklo_pd(_mm512_castps_pd(t[i + j]), _mm512_castps_pd(t[i + 2 + j]));
      u[i + 2 * j + 1] =
          _mm512_unpackhi_pd(_mm512_castps_pd(t[i + j]), _mm512_castps_pd(t[i + 2 + j]));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 low01 =
        _mm512_shuffle_f32x4(_mm512_castpd_ps(u[i]), _mm512_castpd_ps(u[4 + i]), 0x44);
    const __m512 high01 =
        _mm512_shuffle_f32x4(_mm512_castpd_ps(u[i]), _mm512_castpd_ps(u[4 + i]), 0xee);
    const __m512 low23 =
        _mm512_shuffle_f32x4(_mm512_castpd_ps(u[8 + i]), _mm512_castpd_ps(u[12 + i]), 0x44);
    const __m512 high23 =
        _mm512_shuffle_f32x4(_mm512_castpd_ps(u[8 + i]), _mm512_castpd_ps(u[12 + i]), 0xee);
    a[i].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
    a[4 + i].v = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    a[8 + i].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
    a[12 + i].v = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
}

// Whole lines of 64 bytes to where a line begins, past the caches.
inline void stream_lines(char* to, const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i),
                        _mm512_loadu_si512(reinterpret_cast<const __m512i*>(from + i)));
  }
  // Streaming stores are not ordered by a release; the fence makes them so.
  _mm_sfence();
}
