"""The kernels, broken on purpose one at a time: each break must be noticed by the tests named beside it.

    python -m tests.kernels.mutants [FILE ...]     all, or those of kernel files named so

Runs on a copy of the tree. Exit status 1 where a mutant is not noticed, or changes nothing.
"""

from __future__ import annotations

import sys

from tests.mutation import ROOT, Mutant, run_mutants

# File, what is replaced (first occurrence), by what, and the tests of tests/kernels that must fail.
MUTANTS: tuple[tuple[str, str, str, str], ...] = (
    # A partial last block of K is read past its end.
    ("matmul", "k_ok = tl.arange(0, BLOCK_K) < k_stop - k", "k_ok = offs_k >= 0", "test_matmul"),
    # The second split starts where the first one does.
    ("matmul", "k_start = tl.program_id(1) * k_per_split", "k_start = 0", "test_matmul"),
    ("matmul_backward", "path(dout, w.T", "path(dout, w.T.flip(0)", "test_matmul_backward"),
    ("matmul_descriptor", "acc += bias.to", "acc -= bias.to", "test_matmul_descriptor"),
    # Tiles of the last, shorter group of rows are visited twice, and others never.
    (
        "language",
        "rows = tl.minimum(num_tiles_m - first_m, GROUP_M)",
        "rows = GROUP_M",
        "test_matmul",
    ),
    # bf16 is truncated, as the interpreter does by itself.
    ("language", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits", "test_norm"),
    # The gate's columns twice.
    ("gated_mlp_descriptor", "w_up_desc.load", "w_gate_desc.load", "test_gated_mlp"),
    ("gated_mlp", "up_shift = F.to(tl.int64)", "up_shift = (F - 1).to(tl.int64)", "test_gated_mlp"),
    (
        "gated_mlp",
        "gate = narrow(gate, dtype)",
        "gate = narrow(gate.to(tl.bfloat16).to(tl.float32), dtype)",
        "test_gated_mlp",
    ),
    # What a rank adds is rounded to bf16, in a whole model of fp32.
    (
        "collectives",
        "total += tl.load(data + offs, mask=offs < stop, other=0.0).to(tl.float32)",
        "total += tl.load(data + offs, mask=offs < stop, other=0.0).to(tl.bfloat16).to(tl.float32)",
        "test_whole_model",
    ),
    ("gated_activation", "dgate *= up", "dgate *= dup", "test_gated_activation"),
    # A query sees one key of the future.
    ("attention_tiles", "seen & (behind >= 0)", "seen & (behind >= -1)", "test_attention"),
    # The running sum is not rescaled to the new maximum.
    ("attention", "total = total * shrink + tl", "total = total + tl", "test_attention"),
    ("attention_mask", "seen & (mask != 0)", "seen | (mask != 0)", "test_attention_mask"),
    (
        "attention_mask",
        "mask.to(tl.float32) * LOG2_E",
        "mask.to(tl.float32)",
        "test_attention_mask",
    ),
    # The transposed tile of the mask is read the wrong way round.
    (
        "attention_backward_kv",
        "mask_places(mask_head, offs_n, offs_m, stride_mt, stride_ms)",
        "mask_places(mask_head, offs_n, offs_m, stride_ms, stride_mt)",
        "test_attention_mask",
    ),
    # Only the first query head of a group counts in dk and dv.
    (
        "attention_backward_kv",
        "tl.range(0, heads * blocks)",
        "tl.range(0, blocks)",
        "test_attention_backward",
    ),
    (
        "attention_backward",
        "delta -= tl.load(dlse",
        "delta += tl.load(dlse",
        "test_attention_backward",
    ),
    (
        "attention_decode",
        "tl.minimum(low + split_size, length)",
        "low + split_size",
        "test_attention_decode",
    ),
    (
        "attention_decode",
        "acc = acc * shrink + part * weight",
        "acc = acc + part * weight",
        "test_attention_decode",
    ),
    # The padding of a row counts in the variance.
    ("norm", "h = tl.where(mask, h - mean, 0.0)", "h = h - mean", "test_norm"),
    ("norm_backward", "dh -= tl.sum(dout, axis=0) / H", "pass", "test_norm"),
    (
        "norm_backward",
        "dweight += dout * (n * tl.load(rstd_ptr + row))",
        "dweight += dout * n",
        "test_norm",
    ),
    # A shard draws the mask of the tensor's start.
    ("dropout", "+ row_start + row % rows_local", "+ row % rows_local", "test_norm"),
    ("rope", "sin = -sin", "cos = -cos", "test_rope"),
    # A rank without columns poisons the sum; the statistics of ranks are added unscaled.
    ("cross_entropy", "other=1.0) * tl.exp(here - maximum)", "other=1.0)", "test_cross_entropy"),
    ("cross_entropy", "cols == target - vocab_start", "cols == target", "test_cross_entropy"),
    # A call overwrites what a slow peer still reads of the call before.
    ("symmetric", "(epoch & 1).to(tl.int64) * capacity", "0 * capacity", "test_collectives"),
    # A wait that has run out is not told.
    (
        "symmetric",
        "tl.store(state_ptr + 2, missing + 1)",
        "tl.store(state_ptr + 2, 0)",
        "test_collectives",
    ),
    (
        "symmetric",
        "tl.store(state_ptr, epoch + 1)",
        "tl.store(state_ptr, epoch)",
        "test_collectives",
    ),
    # Each rank starts the sum with itself, so ranks round differently.
    (
        "collectives",
        "data = region_data(addresses_ptr, r, epoch, capacity, dest_ptr)",
        "data = region_data(addresses_ptr, (r + 1) % R, epoch, capacity, dest_ptr)",
        "test_collectives",
    ),
    # The second step reads a part before its owner has summed it.
    (
        "collectives",
        "wait_peers(addresses_ptr, rank, epoch, second, state_ptr, timeout_ns, R)",
        "pass",
        "test_collectives",
    ),
    # A peer's rows are fetched before they have come. (That the multiplying programs wait for the
    # copying ones can't be seen here: the interpreter runs one program after another.)
    (
        "all_gather_matmul",
        "wait(addresses_ptr, rank, epoch, program * R + source, source, state_ptr, timeout_ns)",
        "pass",
        "test_fused_collectives",
    ),
    (
        "matmul_reduce_scatter",
        "data + source * slot",
        "data + rank * slot",
        "test_fused_collectives",
    ),
    # The bias is added before the sum is rounded.
    (
        "matmul_reduce_scatter",
        "total = value.to(tl.float32)",
        "total = total",
        "test_fused_collectives",
    ),
    ("matmul_all_reduce", "owner = tile // programs % R", "owner = 0", "test_fused_collectives"),
    ("matmul_all_reduce", "data += source * slot", "data += rank * slot", "test_fused_collectives"),
    # The residual is added before the sum is rounded.
    (
        "all_reduce_residual_rms_norm",
        "narrow(total, dtype).to(tl.float32)",
        "total",
        "test_fused_collectives",
    ),
)


def file_of(folder: str, name: str) -> str:
    """The one file of this name in the folder, or in one of its own."""
    (path,) = (ROOT / folder).rglob(f"{name}.py")
    return path.relative_to(ROOT).as_posix()


def mutants() -> list[Mutant]:
    """All of them, with the places of their files."""
    return [
        Mutant(file_of("kernels", name), old, new, file_of("tests/kernels", test))
        for name, old, new, test in MUTANTS
    ]


if __name__ == "__main__":
    sys.exit(run_mutants(mutants(), sys.argv[1:]) > 0)
