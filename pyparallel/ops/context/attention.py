"""Attention over a sequence that is cut over ranks: the one entry, which picks how."""

from __future__ import annotations

from torch import Tensor

from pyparallel import autocast
from pyparallel.comm.context import ContextShards
from pyparallel.ops.context.choice import choose_for
from pyparallel.ops.context.ring import ring_attention
from pyparallel.ops.context.ulysses import ulysses_attention


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shards: ContextShards,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """``o_r [B, S_r, N, D] = softmax(scale q_r k^T) v`` over the tokens of all ranks. Differentiable.

    Args:
        q: [B, S_r, N, D]; k, v: [B, S_r, G, D]: this rank's tokens, in the order of ``shards``.
        shards: who holds which positions, the documents, and the algorithm.
        window: how many keys, its own included, a query sees; causal only.

    Raises:
        ValueError: shapes that don't fit the shards, or an algorithm that can't run on them.
    """
    _check(q, k, v, shards)
    if autocast.is_on():
        q, k, v = autocast.lowered(q, k, v)
    options = {"causal": causal, "window": window, "scale": scale}
    algorithm = "ring" if shards.group.size == 1 else shards.algorithm
    if algorithm == "auto":
        algorithm = choose_for(q, k, shards, causal=causal, window=window).algorithm
    attend = ring_attention if algorithm == "ring" else ulysses_attention
    return attend(q, k, v, shards, **options)


def _check(q: Tensor, k: Tensor, v: Tensor, shards: ContextShards) -> None:
    size = shards.sizes[shards.group.rank]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4 or tensor.shape[1] != size:
            raise ValueError(
                f"{name}: expected [B, {size}, heads, D], the tokens of rank {shards.group.rank} of a "
                f"sequence of {shards.length}; got {tuple(tensor.shape)}"
            )
    if k.shape != v.shape or q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"k, v: expected the same shape, with heads that divide q's {q.shape[2]} and of its size "
            f"{q.shape[3]}; got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if shards.documents is not None and len(shards.documents) not in (1, q.shape[0]):
        raise ValueError(
            f"documents: expected boundaries for all or for each of {q.shape[0]} sequences, "
            f"got {len(shards.documents)}"
        )
