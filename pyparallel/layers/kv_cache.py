"""One layer's keys and values of the tokens so far, for this rank's KV heads."""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel.cut import huge_pages
from pyparallel.layers.span import Span


class KVCache:
    """A static cache: slot t of a sequence holds its token at position t.

    Attributes:
        keys, values: [B, G_r, T, D]: each head's slots lie one after another in memory; values of
            ``value_dim`` features where that is given.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        length: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch, num_kv_heads, length, head_dim)
        # Zeros, since attention multiplies the hidden slots' values by a weight of zero.
        self.keys = huge_pages.zeros(shape, device=device, dtype=dtype)
        shape = (*shape[:-1], head_dim if value_dim is None else value_dim)
        self.values = huge_pages.zeros(shape, device=device, dtype=dtype)

    def write(self, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Store ``k, v [B, S, G_r, D]`` in the span's slots; return all slots up to its end,
        [B, T, G_r, D]."""
        length = self.keys.shape[2]
        if span.end > length:
            raise ValueError(f"KV cache: position {span.end - 1} does not fit its {length} slots")
        for cache, new in ((self.keys, k), (self.values, v)):
            if span.uniform:
                start = span.end - new.shape[1]
                cache[:, :, start : span.end] = new.transpose(1, 2)
            else:
                rows = torch.arange(new.shape[0], device=new.device).unsqueeze(1)
                cache[rows, :, span.positions] = new
        return tuple(c[:, :, : span.end].transpose(1, 2) for c in (self.keys, self.values))
