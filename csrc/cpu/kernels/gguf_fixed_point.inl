// Activations as integers, for the dot product of bytes (AVX-512 VNNI), to fp32's accuracy.
//
// A block of 32 activations has a common power of two s, and is x = s X, rounded to the nearest: |X| <= 2^22,
// so the error is at most 2^-23 of the power of two above the block's largest |x|. X is cut into bytes from
// the lowest up, X = (x0 256 + x1) 256 + x2, each in [-128, 127], and
//
//   x . w = sum over blocks of  d s (sum of X q)  +  m s (sum of X)
//
// where the sums in parentheses are of integers, so exact in any order: few rows and many give the same bits.
// q is unsigned there; what q4_0 (8) and q8_0 (whose sign bit is flipped: 128) have too much is taken off by
// where the sums start. A q8_0's sum needs more than 32 bits: that of x0 256 + x1 and that of x2 are kept.
//
// Numbers with an exponent in common are block floating point (Wilkinson 1963, chapter 1).

struct FixedBlock {
  int8_t bytes[3][kBlockWeights];
  float scale;
  float sum;          // of x; where the blocks have a minimum
  int32_t high, low;  // where the sums start of x0 256 + x1, and of x2
  // The j-th four of x0, x1 or x2, in every lane.
  __m512i four(int piece, int j) const {
    int32_t word;
    std::memcpy(&word, bytes[piece] + 4 * j, 4);
    return _mm512_set1_epi32(word);
  }
};

template <class Block>
struct FixedPoint {
  static constexpr int kBits = 22;
  static constexpr int kTooMuch = Block::kBits == 8 ? 128 : Block::kBias;
  static constexpr bool kMinimum = Block::kScales == 2;
  static constexpr bool kSplit = Block::kBits == 8;

  static inline int32_t total(__m512i a, __m512i b) {
    return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
  }
  static inline __m512 power(int32_t biased) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(biased << 23));
  }

  // X is cut into bytes at once: 128 more in each make it unsigned, and flip its sign bit after all.
  static inline __m512i cut(__m512i a) {
    const __m512i middle = _mm512_set1_epi32(0x808080);
    const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(a, middle), middle);
    // Of each four: their x0, x1 and x2.
    const __m128i order = _mm_setr_epi8(2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12, -1, -1, -1, -1);
    return _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(order));
  }

  static inline void fix(const float* x, FixedBlock& to) {
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    // Magnitudes are ordered as their bits are.
    const __m512i a_bits = _mm512_castps_si512(_mm512_abs_ps(a)),
                  b_bits = _mm512_castps_si512(_mm512_abs_ps(b));
    int32_t exponent = _mm512_reduce_max_epi32(_mm512_max_epi32(a_bits, b_bits)) >> 23;
    if (exponent == 255) {
      // An infinity or a NaN: the sums become NaN.
      std::memset(&to, 0, sizeof to);
      to.scale = to.sum = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    // The scale and its reciprocal stay normal numbers; what is smaller becomes 0.
    exponent = exponent < 32 ? 32 : exponent;
    const __m512 up = power(kBits + 253 - exponent);
    const __m512i A = _mm512_cvtps_epi32(_mm512_mul_ps(a, up)),
                  B = _mm512_cvtps_epi32(_mm512_mul_ps(b, up));
    to.scale = _mm512_cvtss_f32(power(exponent + 1 - kBits));
    to.sum = kMinimum ? float(total(A, B)) * to.scale : 0;
    const __m512i a_fours = cut(A), b_fours = cut(B);
    const __m512i high_two =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i last = _mm512_add_epi32(high_two, _mm512_set1_epi32(2));
    const __m256i low = _mm512_castsi512_si256(_mm512_permutex2var_epi32(a_fours, last, b_fours));
    _mm512_storeu_si512(to.bytes[0], _mm512_permutex2var_epi32(a_fours, high_two, b_fours));
    _mm256_storeu_si256((__m256i*)to.bytes[2], low);
    to.high = to.low = 0;
    if (kTooMuch != 0) {
      const __m256i fours = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), low);
      const int32_t low_total = _mm512_reduce_add_epi32(_mm512_zextsi256_si512(fours));
      to.high = -kTooMuch * ((total(A, B) - low_total) / 256);
      to.low = -kTooMuch * low_total;
    }
  }

  // q of the rows of a group, weights 4 j to 4 j + 3 of each in to[j].
  static inline void open(const Group<Block>& group, int64_t b, __m512i (&to)[kBlockWeights / 4]) {
    const __mmask16 lanes = first(group.rows);
#pragma GCC unroll 8
    for (int j = 0; j < Block::kWords; ++j) {
      const __m512i words = _mm512_maskz_loadu_epi32(lanes, group.words(b, j));
      if (Block::kBits == 8) {
        to[j] = _mm512_xor_si512(words, _mm512_set1_epi8(-128));
      } else {
        const __m512i nibble = _mm512_set1_epi8(15);
        to[j] = _mm512_and_si512(words, nibble);
        to[4 + j] = _mm512_and_si512(_mm512_srli_epi32(words, 4), nibble);
      }
    }
  }
};

// All blocks of x [M, K].
struct FixedRows {
  template <class Block>
  static FixedRows make(const LinearCall& call, Block) {
    const int64_t blocks = call.K / kBlockWeights;
    FixedBlock* to = static_cast<FixedBlock*>(call.workspace);
    for (int64_t i = 0; i < call.M * blocks; ++i) {
      FixedPoint<Block>::fix(call.x + i / blocks * call.x_stride + i % blocks * kBlockWeights,
                             to[i]);
    }
    return {to};
  }
  const FixedBlock* blocks;
};

// to[m * kGroupRows + lane] = x[m] . the group's row `lane`
template <class Block>
inline void dot_group(const Group<Block>& group, const LinearCall& call, const FixedRows& rows,
                      float* to) {
  using Fixed = FixedPoint<Block>;
  const int64_t blocks = call.K / kBlockWeights;
  __m512 acc[kMaxThinRows];
  for (int64_t m = 0; m < call.M; ++m) acc[m] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b) {
#pragma GCC unroll 9
    for (int64_t at = 0; at < kGroupRows * Group<Block>::kRowBytes; at += 64) {
      __builtin_prefetch(group.block(b) + at + kPrefetchBytes, 0, 2);
    }
    __m512i q[kBlockWeights / 4];
    Fixed::open(group, b, q);
    const __m512 d = group.scale(b, 0, 0, W).v,
                 minimum = group.scale(b, Block::kScales - 1, 0, W).v;
    for (int64_t m = 0; m < call.M; ++m) {
      const FixedBlock& x = rows.blocks[m * blocks + b];
      // Two chains a byte: six hide the latency of the dot product.
      __m512i sums[3][2] = {};
      if (Fixed::kTooMuch != 0) {
        sums[1][0] = _mm512_set1_epi32(x.high);
        sums[2][0] = _mm512_set1_epi32(x.low);
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 4
        for (int p = 0; p < 3; ++p)
          sums[p][j % 2] = _mm512_dpbusd_epi32(sums[p][j % 2], q[j], x.four(p, j));
      }
      const auto sum = [&](int p) { return _mm512_add_epi32(sums[p][0], sums[p][1]); };
      const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(sum(0), 8), sum(1));
      __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(x.scale));
      __m512i last = sum(2);
      if (Fixed::kSplit) {
        acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high),
                                 _mm512_mul_ps(scale, _mm512_set1_ps(256)), acc[m]);
      } else {
        last = _mm512_add_epi32(_mm512_slli_epi32(high, 8), last);
      }
      acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(last), scale, acc[m]);
      if (Fixed::kMinimum) acc[m] = _mm512_fmadd_ps(_mm512_set1_ps(x.sum), minimum, acc[m]);
    }
  }
  for (int64_t m = 0; m < call.M; ++m) _mm512_storeu_ps(to + m * kGroupRows, acc[m]);
}
