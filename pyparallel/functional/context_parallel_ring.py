"""Attention over a sequence cut over R ranks, whose keys and values travel around a ring.

Legend: q_r, o_r [B, S_r, N, D]; k_r, v_r [B, S_r, G, D], the tokens of rank r; step s = 0 .. R-1.

    forward   at step s rank r holds c = (r - s) mod R's keys:
              (o_r, lse_r) = merge(o_r, lse_r; attention(q_r, k_c, v_c))
    backward  the same keys travel again, and one step behind them their gradients:
              dq_r += dq(q_r, k_c, v_c),  dk_c += dk(q_r, k_c, v_c),  dv_c += dv(q_r, k_c, v_c)

The next keys travel while these are worked on. Gradients are fp32 sums (fp64 for fp64 inputs), taken in
the order c, c+1, .. in which the ranks see block c, and rounded once.

Communication a rank: forward R-1 shifts of 2 S_r G D elements of q's dtype; backward the same and R
shifts of 2 S_r G D elements of fp32. Memory: two key blocks, whatever R is.
Sources: Liu et al. 2023, "Ring Attention with Blockwise Transformers"; Brandon et al. 2023, "Striped
Attention" (balance); the merge of :mod:`pyparallel.functional.merge_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel.attention_blocks import Block, plan_blocks
from pyparallel.context import ContextShards
from pyparallel.functional.block_attention import (
    attend_blocks_,
    attend_blocks_backward_,
    nothing_yet,
    wide,
)
from pyparallel.functional.ring_shift import ring_shift_raw


class _RingAttention(Function):
    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shards: ContextShards,
        plans: list[tuple[Block, ...]],
        scale: float | None,
    ) -> Tensor:
        ctx.plan = shards, plans, scale
        o, lse = nothing_yet(q)
        block = torch.stack([k, v])
        for step, (own, coming) in enumerate(_visits(shards)):
            pending = None
            if step < shards.group.size - 1:
                pending = ring_shift_raw(block, shards.group, received=_numel(k, shards, coming))
            attend_blocks_(o, lse, q, *block, plans[own], scale)
            if pending is not None:
                block = _as_block(pending.wait(), k)
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, o, lse = ctx.saved_tensors
        shards, plans, scale = ctx.plan
        group = shards.group
        dq = torch.zeros(q.shape, dtype=wide(q.dtype), device=q.device)
        block = torch.stack([k, v])
        gradients = None
        for step, (own, coming) in enumerate(_visits(shards)):
            pending = None
            received = _numel(k, shards, coming)
            if step < group.size - 1:
                pending = ring_shift_raw(block, group, received=received)
            part = torch.zeros(block.shape, dtype=wide(k.dtype), device=k.device)
            saved = (q, block[0], block[1], o, lse)
            attend_blocks_backward_(dq, part[0], part[1], saved, do, plans[own], scale)
            if gradients is not None:
                part = _as_block(gradients.wait(), k).add_(part)
            gradients = ring_shift_raw(part, group, received=received)
            if pending is not None:
                block = _as_block(pending.wait(), k)
        dk, dv = _as_block(gradients.wait(), k).to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None


def _visits(shards: ContextShards) -> list[tuple[int, int]]:
    """For each step: whose keys are here, and whose come next."""
    rank, size = shards.group.rank, shards.group.size
    return [((rank - step) % size, (rank - 1 - step) % size) for step in range(size)]


def _numel(k: Tensor, shards: ContextShards, rank: int) -> int:
    return 2 * k.shape[0] * shards.sizes[rank] * k.shape[2] * k.shape[3]


def _as_block(flat: Tensor, k: Tensor) -> Tensor:
    """[2, B, S_c, G, D], of any number of tokens."""
    tokens = flat.numel() // max(1, 2 * k.shape[0] * k.shape[2] * k.shape[3])
    return flat.view(2, k.shape[0], tokens, *k.shape[2:])


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shards: ContextShards,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """``o_r`` of this rank's tokens over all ranks' tokens; see the module's equations.

    Args:
        q: [B, S_r, N, D]. k, v: [B, S_r, G, D].
        shards: who holds which positions, and the documents.
        window: how many keys, its own included, a query sees; causal only.
    """
    rank = shards.group.rank
    ranges = shards.sharding.ranges
    options = {"causal": causal, "window": window, "documents": shards.documents}
    plans = [plan_blocks(ranges[rank], held, **options) for held in ranges]
    return _RingAttention.apply(q, k, v, shards, plans, scale)
