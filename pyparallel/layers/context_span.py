"""What attention does in one call of a model whose sequences are cut over ranks.

A :class:`~pyparallel.layers.span.Span` carries one of these where the context is cut:
:class:`ContextPrefill`, every rank has its tokens of whole sequences; :class:`ContextStep`, every rank
has the same few new tokens, and its part of a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyparallel.comm.context import ContextShards
from pyparallel.comm.group import Group
from pyparallel.layers.context_kv_cache import ContextKVCache, ContextSlots
from pyparallel.layers.span import Span
from pyparallel.ops.context.attention import context_parallel_attention
from pyparallel.ops.context.decode import context_parallel_decode


@dataclass(frozen=True)
class ContextPrefill:
    """Whole sequences, cut over the ranks: training, or a prompt."""

    shards: ContextShards
    slots: ContextSlots | None = None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cache: ContextKVCache | None,
        causal: bool,
        window: int | None,
    ) -> Tensor:
        """``o [B, S_r, N, D]`` over all ranks' tokens; ``cache`` gets this rank's keys and values."""
        if cache is not None:
            cache.write_prompt(k, v, self.slots)
        return context_parallel_attention(q, k, v, self.shards, causal=causal, window=window)


@dataclass(frozen=True)
class ContextStep:
    """New tokens on every rank, after what the caches hold.

    Attributes:
        positions: [B, S], of the new tokens.
        owned: sequence, token and slot of each new token that this rank will hold.
        held: the positions in this rank's slots, [T_r].
        uniform: whether all sequences stand at one and the same position.
    """

    group: Group
    positions: Tensor
    owned: tuple[Tensor, ...]
    held: Tensor
    uniform: bool

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cache: ContextKVCache | None,
        causal: bool,
        window: int | None,
    ) -> Tensor:
        """``o [B, S, N, D]`` over the slots of all ranks, the same on every rank."""
        if not causal:
            raise ValueError("causal: expected True for decoding over a cache that is spread")
        k, v = cache.write(k, v, self.owned, self.held.shape[0])
        mask = None
        if not self.uniform or window is not None:
            behind = self.positions.unsqueeze(-1) - self.held
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            mask = seen.unsqueeze(1)
        return context_parallel_decode(q, k, v, self.group, mask=mask)


def prefill_span(
    batch: int,
    shards: ContextShards,
    *,
    device: torch.device,
    rotary: nn.Module | None,
    cached: bool,
) -> Span:
    """The span of this rank's tokens; positions count anew in every document."""
    positions = shards.positions(device=device, in_documents=True)
    # The longest document of all ranks says how long the call is, as its largest position does.
    bounds = shards.documents or ((0, shards.length),)
    longest = max(stop - start for row in bounds for start, stop in itertools.pairwise(row))
    return Span(
        positions.expand(batch, -1),
        shards.length,
        uniform=True,
        rotation=None if rotary is None else rotary(positions, longest),
        context=ContextPrefill(shards, ContextSlots(shards) if cached else None),
    )


def step_span(
    starts: Sequence[int],
    length: int,
    cache: ContextKVCache,
    *,
    device: torch.device,
    rotary: nn.Module | None,
) -> Span:
    """The span of ``length`` new tokens a sequence, the first of them at ``starts[b]``.

    Raises:
        ValueError: no prompt has been written, or the tokens go beyond the cache.
    """
    slots = cache.slots
    if slots is None:
        raise ValueError(f"starts: expected 0 for the first call on a cache, got {max(starts)}")
    span = Span.of(starts, length, device=device, rotary=rotary)
    if span.end > cache.length:
        raise ValueError(
            f"KV cache: position {span.end - 1} does not fit its {cache.length} positions"
        )
    # From the host's numbers: on a device, how many are found would have to be waited for.
    own = slots.slots_of(Span.of(starts, length, device="cpu", rotary=None).positions)
    rows, tokens = torch.nonzero(own >= 0, as_tuple=True)
    written = tuple(t.to(device) for t in (rows, tokens, own[rows, tokens]))
    held = slots.positions_of(slots.filled(span.end), device)
    context = ContextStep(
        slots.group,
        span.positions,
        written,
        held,
        span.uniform and length == 1 and span.end > slots.prompt_length,
    )
    return Span(span.positions, span.end, span.uniform, span.rotation, context=context)
