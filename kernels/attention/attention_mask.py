"""A mask of its own beside causal and window: which keys count, or what is added to their scores.

mask [B or 1, N or 1, S, T], any strides (0 where broadcast, as torch.expand gives them):
boolean, True where a query sees a key, or floating, added to the scaled scores. Where it adds
-inf, or so negative a number that fp32 takes it for that (a dtype's lowest), the key is unseen;
a query that sees no key has o = 0 and lse = -inf, as everywhere here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyparallel.kernels.language import LOG2_E
from pyparallel.kernels.launch import FLOATS, check_runnable

MASKS = ("none", "boolean", "additive")


@triton.jit
def mask_places(mask_ptr, rows, columns, stride_rows, stride_columns):
    """Pointers to the tile [rows, columns] of the mask: queries by keys, or keys by queries."""
    down = rows[:, None].to(tl.int64) * stride_rows
    return mask_ptr + down + columns[None, :].to(tl.int64) * stride_columns


@triton.jit
def apply_mask(scores, seen, mask_ptrs, MASK: tl.constexpr):
    """(scores, seen) of a tile, either way round, with the mask joined in; scores in log2 units.
    Only what is seen is read."""
    if MASK == "none":
        return scores, seen
    else:
        mask = tl.load(mask_ptrs, mask=seen, other=0)
        if MASK == "boolean":
            return scores, seen & (mask != 0)
        else:
            return scores + mask.to(tl.float32) * LOG2_E, seen


def mask_arguments(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, varlen: bool
) -> tuple[str, torch.Tensor | None, tuple[int, int, int, int]]:
    """(MASK, pointer, strides over B, N, S, T) for q [B, S, N, D] and k [B, T, G, D]."""
    if mask is None:
        return "none", None, (0, 0, 0, 0)
    check_runnable("attention", q, mask)
    if varlen:
        raise ValueError("mask: expected None beside cu_seqlens, whose sequences are bounds enough")
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    fits = mask.dim() == 4 and all(a in (1, b) for a, b in zip(mask.shape, shape, strict=True))
    if not fits or mask.dtype not in (torch.bool, *FLOATS):
        raise ValueError(f"mask: expected bool or float that expands to {shape}, got {mask.dtype} "
                         f"{tuple(mask.shape)}")
    boolean = mask.dtype is torch.bool
    # Triton's pointers to bool are bits; torch stores bytes.
    pointer = mask.view(torch.uint8) if boolean else mask
    return "boolean" if boolean else "additive", pointer, tuple(mask.expand(shape).stride())
