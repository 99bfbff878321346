// The compute kernels of one CPU rank: what each takes, and the table of them for each instruction set.
//
// M rows of activations, N outputs, K inputs, D head size. Activations are fp32 throughout; weights and
// the KV cache are fp32, bf16, fp16 (weights also int8 or GGUF's blocks) and are widened as they are
// read. Every sum is carried in fp32 in an order that depends on neither the number of threads nor the
// other rows, so a token's bits are the same alone and in a batch of up to kMaxThinRows.
//
// Kernels know raw pointers only: no threads, no ranks, no torch. A caller that shares work over threads
// gives each its own range.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "cpu/simd/isa.h"

namespace pyparallel::cpu {

enum class Precision : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, q4_0 = 4, q4_1 = 5, q8_0 = 6 };

// How many weights of a row a block of the q formats holds (gguf_blocks.inl).
constexpr int64_t kBlockWeights = 32;

// How many rows' blocks are woven into one another.
constexpr int64_t kGroupRows = 16;

constexpr bool in_blocks(Precision precision) { return precision >= Precision::q4_0; }

// Of one number that is not in blocks.
constexpr int64_t bytes_of(Precision precision) {
  return precision == Precision::f32 ? 4 : precision == Precision::i8 ? 1 : 2;
}

// Of n numbers in a row.
constexpr int64_t bytes_of(Precision precision, int64_t n) {
  switch (precision) {
    case Precision::q4_0: return n / kBlockWeights * 18;
    case Precision::q4_1: return n / kBlockWeights * 20;
    case Precision::q8_0: return n / kBlockWeights * 34;
    default: return n * bytes_of(precision);
  }
}

// Up to this many rows the matmul is bound by reading the weights, and reads them in place.
constexpr int64_t kMaxThinRows = 16;

// A matrix [N, K], row-major and dense. int8 weights have one scale a row: w = scale[n] * data[n, k].
// In blocks K is a multiple of kBlockWeights, and the matrix is rows [first, first + N) of one of `rows`
// rows, whose blocks are woven: `data` is that one's.
struct Weight {
  const void* data = nullptr;
  const float* scale = nullptr;
  const float* bias = nullptr;
  Precision precision = Precision::f32;
  int64_t rows = 0;
  int64_t first = 0;

  // The matrix that begins n rows further down, with a bias of its own.
  Weight from_row(int64_t n, int64_t K) const {
    Weight w = *this;
    if (in_blocks(precision)) {
      w.first += n;
    } else {
      w.data = static_cast<const unsigned char*>(data) + n * bytes_of(precision, K);
    }
    if (scale != nullptr) w.scale += n;
    if (bias != nullptr) w.bias += n;
    return w;
  }
};

// y[m, n] = act(x[m] . weight[n] + bias[n]) * (x[m] . up[n] + up_bias[n]) + residual[m, n]
// for n in [begin, end); the factor and the residual only where given. y may be residual; up has weight's
// precision.
struct LinearCall {
  const float* x;
  int64_t x_stride;
  int64_t M;
  int64_t K;
  Weight weight;
  Weight up;
  Activation act = Activation::none;
  const float* residual = nullptr;
  int64_t residual_stride = 0;
  float* y;
  int64_t y_stride;
  int64_t begin;
  int64_t end;
  // Round x to bf16 and use the bf16 dot product where there is one (block_linear only).
  bool bf16_compute = false;
  // block_linear, and weights in blocks: block_linear_bytes(M, K) bytes, 64-byte aligned, of the calling
  // thread.
  void* workspace = nullptr;
};

// One KV head, rows of D at these strides (in elements), and the query heads that share it.
struct AttentionCall {
  const float* q;        // [M, G, D], already scaled by 1/sqrt(D)
  int64_t q_row_stride;  // between positions
  int64_t q_head_stride;
  const void* keys;  // [length, D]
  const void* values;
  int64_t key_stride;
  Precision precision;
  int64_t G;
  int64_t D;
  float* out;  // [M, G, D] in the strides of out_*
  int64_t out_row_stride;
  int64_t out_head_stride;
  void* workspace = nullptr;
};

// Keys of one query that are attended to in a task of their own, whatever the number of threads: the order of
// the sums is fixed by it.
constexpr int64_t kSplitKeys = 256;

// The online-softmax state of G heads over part of the keys (Milakov & Gimelshein 2018):
// out holds sum_t exp(s_t - maximum) v_t, unnormalised.
struct SoftmaxState {
  float* maximum;  // [G]
  float* total;    // [G]
};

struct Kernels {
  // M <= kMaxThinRows.
  void (*thin_linear)(const LinearCall&);
  void (*block_linear)(const LinearCall&);
  int64_t (*block_linear_bytes)(int64_t M, int64_t K);
  // One position: q [G, D] against keys [begin, end); leaves the unnormalised sum and its state.
  void (*decode_attention)(const AttentionCall&, int64_t begin, int64_t end, SoftmaxState);
  // out[g] = sum over the splits, normalised; split s lies at partial + s * split_stride.
  void (*merge_attention)(const float* partial, int64_t split_stride, SoftmaxState states,
                          int64_t splits, int64_t G, int64_t D, float* out,
                          int64_t out_head_stride);
  // M positions, row m at absolute position start + m, sees keys (start + m - window, start + m].
  void (*prefill_attention)(const AttentionCall&, int64_t M, int64_t start, int64_t window);
  int64_t (*prefill_attention_bytes)(int64_t G, int64_t D);
  // x[:rotary] is turned by the angles: x1' = x1 cos - x2 sin, x2' = x2 cos + x1 sin, over the halves.
  void (*rope)(float* x, const float* cos, const float* sin, int64_t rotary);
  // y = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
  // y = (x - mean) / sqrt(var + eps) * weight + bias
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                     float* y);
  // x[i] += parts[0][i] + parts[1][i] + ..., the sum over ranks in rank order first (+ bias[i] last).
  void (*add_parts)(float* x, const float* const* parts, int64_t count, const float* bias,
                    int64_t n);
  // The first index of the largest value.
  int64_t (*argmax)(const float* x, int64_t n);
  void (*scale)(float* x, float factor, int64_t n);
  // Row n of a matrix [.., K] as it is used.
  void (*weight_row)(const Weight&, int64_t n, int64_t K, float* to);
  // Not of blocks.
  void (*to_float)(const void* from, Precision precision, int64_t n, float* to);
  void (*from_float)(const float* from, Precision precision, int64_t n, void* to);
};

const Kernels& kernels_plain();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
#endif

inline const Kernels& kernels(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::avx512_bf16: return kernels_avx512_bf16();
    case Isa::avx512: return kernels_avx512();
    case Isa::avx2: return kernels_avx2();
    default: break;
  }
#endif
  (void)isa;
  return kernels_plain();
}

inline const Kernels& kernels() { return kernels(isa_in_use().load(std::memory_order_relaxed)); }

}  // namespace pyparallel::cpu
