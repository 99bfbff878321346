"""One layer's keys and values, with the tokens so far spread over the context-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyparallel.comm.context import ContextShards
from pyparallel.comm.group import Group


class ContextSlots:
    """Which slot of which rank holds a position: the same for all sequences and layers.

    The prompt's positions lie where the prefill worked on them. Later ones go round the ranks, those
    with fewer tokens first, so that no rank ever holds more than ceil(T / R) of T positions.

    Args:
        prompt: how the prompt was cut.
    """

    def __init__(self, prompt: ContextShards) -> None:
        self.group = prompt.group
        self.prompt_length = prompt.length
        sizes = prompt.sizes
        rank = self.group.rank
        self._held = sizes[rank]
        order = sorted(range(self.group.size), key=sizes.__getitem__)
        self._turn = order.index(rank)
        # Slot of each of the prompt's positions on this rank, -1 on another.
        slots = torch.full((prompt.length,), -1, dtype=torch.long)
        positions = prompt.positions()[0]
        slots[positions] = torch.arange(self._held)
        self._slots, self._positions = slots, positions

    def filled(self, end: int) -> int:
        """How many slots of this rank hold positions below ``end``, which is beyond the prompt."""
        later = max(0, end - self.prompt_length)
        return self._held + (later - self._turn + self.group.size - 1) // self.group.size

    def slots_of(self, positions: Tensor) -> Tensor:
        """The slots of positions on this rank; -1 for those of other ranks."""
        later = positions - self.prompt_length
        slots = self._held + later.div(self.group.size, rounding_mode="floor")
        slots = slots.masked_fill(later % self.group.size != self._turn, -1)
        if self.prompt_length == 0:
            return slots
        inside = positions.clamp(max=self.prompt_length - 1)
        return torch.where(later < 0, self._slots.to(positions.device)[inside], slots)

    def positions_of(self, count: int, device: torch.device) -> Tensor:
        """The positions that this rank's first ``count`` slots hold."""
        later = torch.arange(max(0, count - self._held)) * self.group.size + self._turn
        return torch.cat([self._positions, later + self.prompt_length])[:count].to(device)


class ContextKVCache:
    """A static cache of ceil(T / R) slots a rank.

    Attributes:
        keys, values: [B, G_r, ceil(T / R), D].
        slots: which position lies where; None until the prompt has been written.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        length: int,
        head_dim: int,
        *,
        group: Group,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.length = length
        shape = (batch, num_kv_heads, -(-length // group.size), head_dim)
        # Zeros, since attention multiplies the hidden slots' values by a weight of zero.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.slots: ContextSlots | None = None

    def write_prompt(self, k: Tensor, v: Tensor, slots: ContextSlots) -> None:
        """Store ``k, v [B, S_r, G_r, D]``, this rank's part of a prompt, and how it was cut."""
        if slots.prompt_length > self.length:
            raise ValueError(
                f"KV cache: a prompt of {slots.prompt_length} does not fit its {self.length} positions"
            )
        for cache, new in ((self.keys, k), (self.values, v)):
            cache[:, :, : new.shape[1]] = new.transpose(1, 2)
        self.slots = slots

    def write(
        self, k: Tensor, v: Tensor, owned: Sequence[Tensor], count: int
    ) -> tuple[Tensor, Tensor]:
        """Store those of ``k, v [B, S, G_r, D]`` that this rank owns; return its first ``count`` slots,
        [B, count, G_r, D].

        Args:
            owned: sequence, token and slot of each, three [n].
        """
        rows, tokens, slots = owned
        for cache, new in ((self.keys, k), (self.values, v)):
            cache[rows, :, slots] = new[rows, tokens]
        return tuple(c[:, :, :count].transpose(1, 2) for c in (self.keys, self.values))
