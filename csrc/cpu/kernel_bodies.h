// Every kernel, written once against Vec; each file kernels_<isa>.cpp includes this inside its own
// unnamed namespace after a simd_<isa>.h.
#include "cpu/gguf_blocks.h"
#include "cpu/elementwise.h"
#include "cpu/norm.h"
#include "cpu/linear_epilogue.h"
#if defined(PYPARALLEL_BYTE_DOT)
#include "cpu/gguf_fixed_point.h"
#else
#include "cpu/gguf_fp32.h"
#endif
#include "cpu/gguf_thin.h"
#include "cpu/thin_linear.h"
#include "cpu/register_tile.h"
#include "cpu/block_linear.h"
#include "cpu/decode_attention.h"
#include "cpu/prefill_attention.h"

inline Kernels kernel_table() {
  return {thin_linear,     block_linear,      block_linear_bytes,      decode_attention,
          merge_attention, prefill_attention, prefill_attention_bytes, rope,
          rms_norm,        layer_norm,        add_parts,               argmax,
          scale,           weight_row,        to_float,                from_float};
}
