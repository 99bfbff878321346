"""Attention over a sequence cut over R ranks, whose keys and values travel around a ring.

Legend: q_r, o_r [B, S_r, N, D]; k_r, v_r [B, S_r, G, D], the tokens of rank r; step s = 0 .. R-1.

    forward   at step s rank r holds c = (r - s) mod R's keys:
              (o_r, lse_r) = merge(o_r, lse_r; attention(q_r, k_c, v_c))
    backward  the same keys travel again, and one step behind them their gradients:
              dq_r += dq(q_r, k_c, v_c),  dk_c += dk(q_r, k_c, v_c),  dv_c += dv(q_r, k_c, v_c)

The next keys travel while these are worked on. Gradients are fp32 sums (fp64 for fp64 inputs), taken in
the order c, c+1, .. in which the ranks see block c, and rounded once.

Communication a rank: forward R-1 shifts of 2 S_r G D elements of q's dtype; backward the same and R
shifts of 2 S_r G D elements of fp32. Memory: two key blocks, whatever R is. One rank sends nothing.
Sources: Liu et al. 2023, "Ring Attention with Blockwise Transformers"; Brandon et al. 2023, "Striped
Attention" (balance); the merge of :mod:`pyparallel.ops.context.merge_attention`.

A registered operator, so that torch.compile can trace it: a graph holds numbers, hence the cut is given
as flat lists of them, and the group by its handle. Its log-sum-exp, kept for backward, has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pyparallel.comm.context import ContextShards
from pyparallel.comm.group import Group
from pyparallel.cut.attention_blocks import Block, plan_blocks
from pyparallel.ops.context.block_attention import (
    attend_blocks_,
    attend_blocks_backward_,
    nothing_yet,
    wide,
)
from pyparallel.ops.context.ring_shift import ring_shift_raw

_CUT = "int[] ranges, int[] documents, int group, bool causal, int? window, float? scale"


@lru_cache(maxsize=512)
def _plans(
    ranges: tuple[int, ...],
    documents: tuple[int, ...],
    rank: int,
    size: int,
    causal: bool,
    window: int | None,
) -> tuple[tuple[tuple[Block, ...], ...], list[int]]:
    """The blocks of this rank's queries and each rank's keys, and how many tokens each rank has."""
    pairs = list(zip(ranges[::2], ranges[1::2], strict=True))
    each = len(pairs) // size
    held = [tuple(pairs[first : first + each]) for first in range(0, len(pairs), each)]
    rows, place = [], 0
    while place < len(documents):
        stop = place + 1 + documents[place]
        rows.append(documents[place + 1 : stop])
        place = stop
    options = {"causal": causal, "window": window, "documents": tuple(rows) or None}
    plans = tuple(plan_blocks(held[rank], other, **options) for other in held)
    return plans, [sum(stop - start for start, stop in other) for other in held]


def visits(rank: int, size: int) -> list[int]:
    """Whose keys ``rank`` of ``size`` has at each step."""
    return [(rank - step) % size for step in range(size)]


class _Ring:
    """One call's steps: whose keys are here at each, and how blocks of keys travel."""

    def __init__(
        self,
        k: Tensor,
        ranges: Sequence[int],
        documents: Sequence[int],
        group: int,
        causal: bool,
        window: int | None,
    ) -> None:
        self.group = Group.of_handle(group)
        rank, size = self.group.rank, self.group.size
        cut = tuple(ranges), tuple(documents)
        self.plans, self._tokens = _plans(*cut, rank, size, causal, window)
        self.visits = visits(rank, size)
        self._shape = k.shape

    def shift(self, block: Tensor, step: int) -> Any:
        """Start handing on the block of ``step``; what comes is the next step's."""
        tokens = self._tokens[(self.visits[step] - 1) % self.group.size]
        batch, _, heads, size = self._shape
        received = 2 * batch * tokens * heads * size
        return ring_shift_raw(block, self.group, received=received)

    def arrived(self, pending: Any) -> Tensor:
        """Keys and values, or their gradients, [2, B, S_c, G, D]."""
        flat = pending.wait()
        batch, _, heads, size = self._shape
        return flat.view(2, batch, flat.numel() // max(1, 2 * batch * heads * size), heads, size)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, *cut: Any, scale: float | None
) -> tuple[Tensor, Tensor]:
    ring = _Ring(k, *cut)
    o, lse = nothing_yet(q)
    block = torch.stack([k, v])
    for step, visited in enumerate(ring.visits):
        last = step == len(ring.visits) - 1
        pending = None if last else ring.shift(block, step)
        attend_blocks_(o, lse, q, block[0], block[1], ring.plans[visited], scale)
        if pending is not None:
            block = ring.arrived(pending)
    return o.to(q.dtype), lse


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *cut: Any,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    ring = _Ring(k, *cut)
    dq = torch.zeros(q.shape, dtype=wide(q.dtype), device=q.device)
    block = torch.stack([k, v])
    travelling = None
    for step, visited in enumerate(ring.visits):
        last = step == len(ring.visits) - 1
        pending = None if last else ring.shift(block, step)
        part = torch.zeros(block.shape, dtype=wide(k.dtype), device=k.device)
        saved = (q, block[0], block[1], o, lse)
        attend_blocks_backward_(dq, part[0], part[1], saved, do, ring.plans[visited], scale)
        if travelling is not None:
            part = ring.arrived(travelling).add_(part)
        if ring.group.size > 1:
            travelling = ring.shift(part, step)
        if pending is not None:
            block = ring.arrived(pending)
    if travelling is not None:
        part = ring.arrived(travelling)
    # An operator's results may not share memory.
    dk, dv = (gradient.to(k.dtype, copy=True) for gradient in part)
    return dq.to(q.dtype), dk, dv


_library = torch.library.Library("pyparallel", "FRAGMENT")
_library.define(f"ring_attention(Tensor q, Tensor k, Tensor v, {_CUT}) -> (Tensor, Tensor)")
_library.define(
    f"ring_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_CUT})"
    " -> (Tensor, Tensor, Tensor)"
)


def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """What the operator does, also of tensors for which it would run its fake kernel."""
    return _forward(q, k, v, *rest[:-1], scale=rest[-1])


def run_backward(do: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`run`, of the operator's backward."""
    return _backward(do, *rest[:-1], scale=rest[-1])


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=wide(q.dtype))
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _fake_backward(do: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in rest[:3])


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.cut = inputs[3:]
    # A handle does not keep its group.
    ctx.group = Group.of_handle(inputs[5])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple:
    nothing = (None,) * len(ctx.cut)
    if do is None:
        return None, None, None, *nothing
    saved = ctx.saved_tensors
    return *torch.ops.pyparallel.ring_attention_backward(do, *saved, *ctx.cut), *nothing


_library.impl("ring_attention", run, "CompositeExplicitAutograd")
_library.impl("ring_attention_backward", run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("pyparallel::ring_attention", _fake_forward, lib=_library)
torch.library.register_fake("pyparallel::ring_attention_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "pyparallel::ring_attention", _differentiate, setup_context=_keep, lib=_library
)


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
    """``o_r`` of this rank's tokens over all ranks' tokens; see the module's equations. Differentiable.

    Args:
        q: [B, S_r, N, D]. k, v: [B, S_r, G, D].
        shards: who holds which positions, and the documents.
        window: how many keys, its own included, a query sees; causal only.
    """
    ranges = [end for held in shards.sharding.ranges for piece in held for end in piece]
    documents = [n for row in shards.documents or () for n in (len(row), *row)]
    cut = (ranges, documents, shards.group.handle, causal, window, scale)
    return torch.ops.pyparallel.ring_attention(q, k, v, *cut)[0]
