"""Attention over :class:`~pyparallel.cut.attention_blocks.Block` rectangles, on one rank.

Legend: q, o [B, S, N, D]; k, v [B, T, G, D]; lse [B, N, S].

    forward   (o, lse) = merge over blocks of attention(q[rows, q], k[rows, k], v[rows, k])
    backward  dq[q] += dq_b, dk[k] += dk_b, dv[k] += dv_b, each from the whole o and lse

Partial results are fp32 (fp64 for fp64 inputs) and added in the order of the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.cut.attention_blocks import Block
from pyparallel.ops.context.merge_attention import merge_attention_


def wide(dtype: torch.dtype) -> torch.dtype:
    """What partial results are kept in."""
    return torch.promote_types(dtype, torch.float32)


def nothing_yet(q: Tensor) -> tuple[Tensor, Tensor]:
    """The o [B, S, N, D] and lse [B, N, S] of having seen no key."""
    batch, num_queries, heads, _ = q.shape
    o = torch.zeros(q.shape, dtype=wide(q.dtype), device=q.device)
    lse = torch.full((batch, heads, num_queries), -math.inf, dtype=wide(q.dtype), device=q.device)
    return o, lse


def attend_blocks_(
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Sequence[Block],
    scale: float | None,
) -> None:
    """Merge what the blocks' queries see of their keys into ``o`` and ``lse``."""
    for block in blocks:
        rows, queries, keys = _slices(block)
        part_o, part_lse = backend.call(
            "attention_with_lse",
            q[rows, queries],
            k[rows, keys],
            v[rows, keys],
            causal=block.causal and block.window is None,
            scale=scale,
            mask=block.mask(q.device),
        )
        merge_attention_(o[rows, queries], lse[rows, :, queries], part_o, part_lse)


def attend_blocks_backward_(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    do: Tensor,
    blocks: Sequence[Block],
    scale: float | None,
) -> None:
    """Add the blocks' gradients to ``dq``, ``dk``, ``dv``.

    Args:
        saved: q, k, v, and the o and lse of the attention over all keys.
    """
    q, k, v, o, lse = saved
    for block in blocks:
        rows, queries, keys = _slices(block)
        part_dq, part_dk, part_dv = backend.call(
            "attention_with_lse_backward",
            q[rows, queries],
            k[rows, keys],
            v[rows, keys],
            o[rows, queries],
            lse[rows, :, queries],
            do[rows, queries],
            causal=block.causal and block.window is None,
            scale=scale,
            mask=block.mask(q.device),
        )
        dq[rows, queries] += part_dq
        dk[rows, keys] += part_dk
        dv[rows, keys] += part_dv


def _slices(block: Block) -> tuple[slice, slice, slice]:
    rows = slice(None) if block.rows is None else slice(*block.rows)
    return rows, slice(*block.q), slice(*block.k)
