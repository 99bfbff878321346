"""Attention over a sequence cut over R ranks, by cutting the heads instead while it runs.

Legend: q_shard_s [B, S_r, N, D], q_shard_n [B, S, N_r, D]; keys and values likewise with G, G_r heads.

    forward   (q, k, v)_shard_n = all_to_all((q, k, v)_shard_s)
              o_shard_n = attention(q_shard_n, k_shard_n, v_shard_n)
              o_shard_s = all_to_all(o_shard_n)
    backward  the same exchanges, reversed; the gradients of KV heads that went to several ranks are
              summed in rank order, in fp32, and rounded once

Heads are cut as tensor parallelism cuts them (:class:`pyparallel.cut.shard.HeadLayout`): uneven where
they do not divide, KV heads replicated where there are fewer than ranks. Every rank needs a query head.

Communication: two all-to-alls forward and two backward, of S_r (N + 2 max(G, R)) D and S_r N D elements.
Source: Jacobs et al. 2023, "DeepSpeed Ulysses", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel.comm.collectives import all_to_all_raw
from pyparallel.comm.context import ContextShards
from pyparallel.comm.group import Group
from pyparallel.cut.shard import HeadLayout, Range, even_parts
from pyparallel.ops.context.block_attention import wide
from pyparallel.ops.context.ring import ring_attention

# Whole sequences of some heads: the ring of one rank.
_ALONE = Group.single()


class _ToHeads(Function):
    """[B, S_r, H, D] to [B, S, H_r, D]: rank r gets heads ``held[r]``, some perhaps as others do."""

    @staticmethod
    def forward(ctx, x: Tensor, shards: ContextShards, held: Sequence[Sequence[int]]) -> Tensor:
        ctx.saved = shards, held, x.shape[2]
        return _to_heads(x, shards, held)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        shards, held, num_heads = ctx.saved
        counts = [len(heads) for heads in held]
        copies = _to_tokens(grad, shards, counts)
        shape = (*copies.shape[:2], num_heads, copies.shape[3])
        total = torch.zeros(shape, dtype=wide(grad.dtype), device=grad.device)
        # Copies of a head come back from several ranks; one rank has each head once.
        for heads, part in zip(held, copies.split(counts, 2), strict=True):
            total[:, :, list(heads)] += part
        return total.to(grad.dtype), None, None


class _ToTokens(Function):
    """[B, S, H_r, D] to [B, S_r, H, D]: the ranks' heads, one after another."""

    @staticmethod
    def forward(ctx, x: Tensor, shards: ContextShards, counts: Sequence[int]) -> Tensor:
        ctx.saved = shards, counts
        return _to_tokens(x, shards, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        shards, counts = ctx.saved
        starts = [sum(counts[:rank]) for rank in range(len(counts))]
        held = [range(a, a + n) for a, n in zip(starts, counts, strict=True)]
        return _to_heads(grad, shards, held), None, None


def _to_heads(x: Tensor, shards: ContextShards, held: Sequence[Sequence[int]]) -> Tensor:
    joined = all_to_all_raw(
        x.index_select(2, _index(held, x.device)),
        shards.group,
        split_dim=2,
        join_dim=1,
        split_sizes=[len(heads) for heads in held],
        join_sizes=shards.sizes,
    )
    order = shards.dense_order()
    return joined if order is None else joined.index_select(1, order.to(x.device))


def _to_tokens(x: Tensor, shards: ContextShards, counts: Sequence[int]) -> Tensor:
    order = shards.rank_order()
    return all_to_all_raw(
        x if order is None else x.index_select(1, order.to(x.device)),
        shards.group,
        split_dim=1,
        join_dim=2,
        split_sizes=shards.sizes,
        join_sizes=list(counts),
    )


def _index(held: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor([head for heads in held for head in heads], device=device)


def head_layout(num_heads: int, num_kv_heads: int, ranks: int) -> HeadLayout:
    """Which heads each rank works on.

    Raises:
        ValueError: more ranks than the heads can be cut into.
    """
    try:
        return HeadLayout.of(num_heads, num_kv_heads, ranks)
    except ValueError as error:
        raise ValueError(
            f"ulysses: {num_heads} query heads in {num_kv_heads} KV groups can't be cut over cp={ranks} "
            f"ranks; use algorithm='ring'"
        ) from error


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shards: ContextShards,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """``o_shard_s`` of this rank's tokens over all ranks' tokens; see the module's equations.

    Args:
        q: [B, S_r, N, D]. k, v: [B, S_r, G, D].
        shards: who holds which positions, and the documents.
        window: how many keys, its own included, a query sees; causal only.

    Raises:
        ValueError: more ranks than the heads can be cut into.
    """
    num_heads, num_kv_heads, ranks = q.shape[2], k.shape[2], shards.group.size
    layout = head_layout(num_heads, num_kv_heads, ranks)
    # One exchange carries all three: heads are numbered through, queries before keys before values.
    held = [
        [*range(*queries), *_from(kv, num_heads), *_from(kv, num_heads + num_kv_heads)]
        for queries, kv in zip(layout.query, layout.kv, strict=True)
    ]
    heads = _ToHeads.apply(torch.cat([q, k, v], 2), shards, held)
    query_counts = [stop - start for start, stop in layout.query]
    own_queries = query_counts[shards.group.rank]
    own_kv = (heads.shape[2] - own_queries) // 2
    whole = ContextShards(_ALONE, even_parts(shards.length, 1, dim=1), shards.documents)
    q, k, v = heads.split([own_queries, own_kv, own_kv], 2)
    o = ring_attention(q, k, v, whole, causal=causal, window=window, scale=scale)
    return _ToTokens.apply(o, shards, query_counts)


def _from(heads: Range, offset: int) -> range:
    return range(offset + heads[0], offset + heads[1])
