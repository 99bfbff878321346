"""Matrices as int8 with one fp32 scale a row.

Legend: N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are quantized together.
ROWS_AT_ONCE = 1024


def quantize_rows(weight: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``weight [N, K]`` as int8 and one fp32 scale a row: ``weight[n] ~ scale[n] * data[n]``.

    The scale is the row's largest magnitude over 127, so the error is at most half a scale.

    Args:
        largest: [N], the rows' largest magnitudes, where ``weight`` is but a part of its rows.
    """
    scale = (largest_of_rows(weight) if largest is None else largest) / 127
    step = torch.where(scale > 0, scale, torch.ones_like(scale))
    data = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows, out, by in zip(*(_row_blocks(t) for t in (weight, data, step)), strict=True):
        out.copy_((rows.detach().float() / by.unsqueeze(1)).round_())
    return data, scale


def largest_of_rows(weight: Tensor) -> Tensor:
    """The largest magnitude [N] of each row of ``weight [N, K]``, fp32; 0 of rows without elements."""
    if weight.shape[1] == 0:
        return torch.zeros(weight.shape[0], device=weight.device)
    return torch.cat([rows.detach().float().abs().amax(1) for rows in _row_blocks(weight)])


def _row_blocks(x: Tensor) -> tuple[Tensor, ...]:
    """A matrix, or a number of each of its rows, in pieces: what is made of one is small."""
    return x.split(ROWS_AT_ONCE)


def dequantized(data: Tensor, scale: Tensor) -> Tensor:
    """``w [N, K] = scale [N] * data [N, K]`` in fp32."""
    return data.float() * scale.float().unsqueeze(1)
