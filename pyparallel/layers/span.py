"""Where a call's tokens stand in their sequences: made once a step, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Context(Protocol):
    """How attention runs where sequences are cut over ranks: :mod:`pyparallel.layers.context_span`."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cache: Any,
        causal: bool,
        window: int | None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Span:
    """The positions of the tokens of one call.

    Attributes:
        positions: [B, S], int64.
        end: one more than the largest position.
        uniform: whether every sequence stands at the same positions, ``end - S`` to ``end``.
        rotation: the cosines and sines [B or 1, S, E] of the positions, where the model rotates.
        mask: [B, 1, S, end], true where a token sees a slot; None where "causal" says it all.
        context: where sequences are cut over ranks; positions are then of this rank's tokens.
        seed: of what a call in training drops, a CPU scalar, int64; None: nothing.
    """

    positions: Tensor
    end: int
    uniform: bool
    rotation: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    context: Context | None = None
    seed: Tensor | None = None

    def seed_of(self, place: int) -> Tensor:
        """The seed of one of a model's places that drop; they are numbered over the whole model."""
        # Odd, and without end: every place has another key of the counter-based generator.
        return self.seed + torch.tensor(-0x61C8864680B583EB) * place

    @classmethod
    def of(
        cls,
        starts: Sequence[int],
        length: int,
        *,
        device: torch.device | str | None = None,
        rotary: torch.nn.Module | None = None,
        window: int | None = None,
    ) -> Span:
        """``length`` tokens a sequence, the first of them at ``starts[b]``."""
        uniform = len(set(starts)) == 1
        first = torch.tensor([starts[0]] if uniform else list(starts), device=device)
        positions = first.unsqueeze(1) + torch.arange(length, device=device)
        end = max(starts) + length
        mask = None
        if not uniform:
            behind = positions.unsqueeze(-1) - torch.arange(end, device=device)
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            mask = seen.unsqueeze(1)
        rotation = None if rotary is None else rotary(positions, end)
        return cls(positions.expand(len(starts), length), end, uniform, rotation, mask)
