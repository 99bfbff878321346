"""Matrices in fewer bits: int8 with one fp32 scale a row, and blocks as GGUF files hold them.

A row of a GGUF is one of blocks of 32 weights, each with its own fp16 scale (of q4_1 a minimum too).

Legend: N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Weights of a block, and its bytes by kind.
BLOCK = 32
BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q8_0": 34}

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


def block_row_bytes(columns: int, kind: str) -> int:
    """The bytes of a row's ``columns`` weights, whole blocks."""
    return columns // BLOCK * BLOCK_BYTES[kind]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A matrix [N, K] in fewer bits, for inference.

    Attributes:
        data: [N, K], int8; or the blocks' bytes [N, K / 32 * bytes of a block], uint8.
        kind: "int8", "q4_0", "q4_1" or "q8_0".
        dtype: what the matrix would be held in densely. Blocks stand for their numbers rounded to it.
        scale: [N], of "int8".

    Raises:
        ValueError: another kind, or its data or scale is not what goes with it.
    """

    data: Tensor
    kind: str
    dtype: torch.dtype
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind != "int8" and self.kind not in BLOCK_BYTES:
            kinds = ", ".join(("int8", *BLOCK_BYTES))
            raise ValueError(f"kind: expected one of {kinds}, got {self.kind!r}")
        if (self.kind == "int8") != (self.scale is not None):
            raise ValueError("scale: int8 goes with one, and no other kind does")
        expected = torch.int8 if self.kind == "int8" else torch.uint8
        if self.data.dtype is not expected:
            raise ValueError(f"data: expected {expected} for {self.kind}, got {self.data.dtype}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, width = self.data.shape
        return rows, width if self.kind == "int8" else width // BLOCK_BYTES[self.kind] * BLOCK

    def rows(self, index: Tensor) -> PackedWeight:
        """The rows ``index [n]``."""
        scale = None if self.scale is None else self.scale[index]
        return PackedWeight(self.data[index], self.kind, self.dtype, scale)

    def unscaled(self) -> Tensor:
        """[N, K] without ``scale``: int8, or the blocks' numbers, rounded to ``dtype``."""
        if self.kind == "int8":
            return self.data
        if self.data.numel() == 0:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.data.device)
        import gguf

        kind = gguf.GGMLQuantizationType[self.kind.upper()]
        values = gguf.quants.dequantize(self.data.detach().cpu().numpy(), kind)
        return torch.from_numpy(values).to(self.data.device, self.dtype)

    def dequantized(self) -> Tensor:
        """``w [N, K]`` in fp32: of int8 ``scale [N] * data``."""
        values = self.unscaled().float()
        return values if self.scale is None else values * self.scale.float().unsqueeze(1)
