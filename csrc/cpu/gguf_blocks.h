// GGUF's blocks of 32 weights as a file holds them, and 32 weights of one as Vecs.
//
//   q4_0: w = d (q - 8)     q4_1: w = d q + m     q8_0: w = d q
//
// d and m are fp16; of a byte of q4 the low nibble is weight j and the high one weight 16 + j. Every
// product is exact in fp32, so a weight is rounded once, as gguf's own dequantization does it, and then
// once more to the floating type in which the model is run: T. A q4 block has only 16 values: they are
// computed once, rounded, and looked up.

struct BlockQ4_0 {
  uint16_t d;
  uint8_t nibbles[kBlockWeights / 2];
};
struct BlockQ4_1 {
  uint16_t d, m;
  uint8_t nibbles[kBlockWeights / 2];
};
struct BlockQ8_0 {
  uint16_t d;
  int8_t quants[kBlockWeights];
};

inline Vec rounded(Vec a, float) { return a; }

alignas(64) constexpr float kLevels[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class T>
inline void look_up_levels(Vec scale, Vec offset, const uint8_t* nibbles, Vec (&w)[kBlockWeights / W]) {
  Vec levels[16 / W];
#pragma GCC unroll 4
  for (int i = 0; i < 16 / W; ++i) levels[i] = rounded(fma(load(kLevels + i * W), scale, offset), T{});
  look_up(levels, nibbles, w);
}

template <class T>
inline void open_block(const BlockQ4_0& block, Vec (&w)[kBlockWeights / W]) {
  const Vec d = set1_half(&block.d);
  look_up_levels<T>(d, mul(d, set1(-8)), block.nibbles, w);
}
template <class T>
inline void open_block(const BlockQ4_1& block, Vec (&w)[kBlockWeights / W]) {
  Vec d, m;
  set1_halves(&block.d, d, m);
  look_up_levels<T>(d, m, block.nibbles, w);
}
template <class T>
inline void open_block(const BlockQ8_0& block, Vec (&w)[kBlockWeights / W]) {
  const Vec d = set1_half(&block.d);
#pragma GCC unroll 8
  for (int i = 0; i < kBlockWeights / W; ++i) w[i] = rounded(mul(load(block.quants + i * W), d), T{});
}

// body(block, T): a null pointer of the precision's block, and a T of the type its weights are rounded to.
template <class Body>
inline void with_block(Precision precision, Precision rounded_to, Body body) {
  const auto with_type = [&](auto* block) {
    switch (rounded_to) {
      case Precision::bf16: return body(block, BFloat16{});
      case Precision::f16: return body(block, Half{});
      default: return body(block, float{});
    }
  };
  switch (precision) {
    case Precision::q4_0: return with_type(static_cast<const BlockQ4_0*>(nullptr));
    case Precision::q4_1: return with_type(static_cast<const BlockQ4_1*>(nullptr));
    default: return with_type(static_cast<const BlockQ8_0*>(nullptr));
  }
}

// n weights, a multiple of kBlockWeights.
inline void open_blocks(const void* from, Precision precision, Precision rounded_to, int64_t n, float* to) {
  with_block(precision, rounded_to, [&]<class Block, class T>(const Block*, T) {
    const Block* block = static_cast<const Block*>(from);
    for (int64_t k = 0; k < n; k += kBlockWeights) {
      Vec w[kBlockWeights / W];
      open_block<T>(*block++, w);
      for (int i = 0; i < kBlockWeights / W; ++i) store(to + k + i * W, w[i]);
    }
  });
}
