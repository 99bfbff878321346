// Every kernel, written once against Vec; each file kernels_<isa>.cpp includes this inside its own
// unnamed namespace, after the fragment of cpu/simd that says what Vec is.

// clang-format off: each fragment uses those before it.
#include "cpu/simd/math.inl"
#include "cpu/kernels/gguf_blocks.inl"
#include "cpu/kernels/elementwise.inl"
#include "cpu/kernels/norm.inl"
#include "cpu/kernels/linear_epilogue.inl"
#if defined(PYPARALLEL_BYTE_DOT)
#include "cpu/kernels/gguf_fixed_point.inl"
#else
#include "cpu/kernels/gguf_fp32.inl"
#endif
#include "cpu/kernels/gguf_thin.inl"
#include "cpu/kernels/thin_linear.inl"
#include "cpu/kernels/register_tile.inl"
#if defined(PYPARALLEL_BYTE_DOT)
#include "cpu/kernels/gguf_linear.inl"
#endif
#include "cpu/kernels/block_linear.inl"
#include "cpu/kernels/decode_attention.inl"
#include "cpu/kernels/prefill_attention.inl"
// clang-format on

inline Kernels kernel_table() {
  return {thin_linear,
          block_linear,
          block_linear_bytes,
          decode_attention,
          merge_attention,
          prefill_attention,
          prefill_attention_bytes,
          rope,
          rms_norm,
          layer_norm,
          add_parts,
          argmax,
          scale,
          weight_row,
          to_float,
          from_float};
}
