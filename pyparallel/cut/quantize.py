"""Matrices in fewer bits: int8 with one fp32 scale a row, and blocks as GGUF files hold them.

A row of a GGUF is one of blocks of 32 weights, each with its own fp16 scale (of q4_1 a minimum too). In
memory the blocks of sixteen rows are woven, as csrc/cpu/kernels/gguf_blocks.inl says, so that the
kernels read one run of bytes with a row a lane.

Legend: N rows (outputs), K columns (inputs), B blocks of a row, S scales and Q words of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Weights of a block, and its bytes by kind.
BLOCK = 32
BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
# Of which are scales.
SCALE_BYTES = {"q4_0": 2, "q4_1": 4, "q8_0": 2}
# Rows whose blocks are woven; the last of a matrix may be fewer.
GROUP_ROWS = 16

# Rows that are quantized or woven together. Few, so that little is held beside the matrix: what comes
# and goes in pieces of a megabyte, as 1024 rows would, leaves gaps of as many in the allocator's memory.
ROWS_AT_ONCE = 256


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


def weave_blocks_(data: Tensor, kind: str) -> Tensor:
    """Blocks as a file has them, in place into the order of the kernels; returns ``data``.

    Args:
        data: [N, B * bytes of a block], uint8.

    Raises:
        ValueError: ``data`` is not contiguous.
    """
    if not data.is_contiguous():
        raise ValueError("data: expected contiguous blocks, got a view; weave a copy of them")
    # One copy's room for all groups: each with its own would leave gaps that no later one fills.
    scratch = torch.empty_like(data[:ROWS_AT_ONCE])
    for woven, rows in _groups(data):
        scales, words = _parts(woven, rows, kind)
        plain = scratch[: woven.shape[0] * rows].copy_(woven.flatten(0, 1))
        blocks = plain.view(len(woven), rows, -1, BLOCK_BYTES[kind])
        scales.copy_(blocks[..., : SCALE_BYTES[kind]].unflatten(-1, (-1, 2)).permute(0, 2, 3, 1, 4))
        words.copy_(blocks[..., SCALE_BYTES[kind] :].unflatten(-1, (-1, 4)).permute(0, 2, 3, 1, 4))
    return data


def unwoven_blocks(data: Tensor, kind: str) -> Tensor:
    """What :func:`weave_blocks_` was given."""
    made = torch.empty_like(data)
    for (woven, rows), (plain, _) in zip(_groups(data), _groups(made), strict=True):
        blocks = plain.unflatten(-1, (-1, BLOCK_BYTES[kind]))
        scales, words = (part.permute(0, 3, 1, 2, 4) for part in _parts(woven, rows, kind))
        blocks[..., : SCALE_BYTES[kind]] = scales.flatten(-2)
        blocks[..., SCALE_BYTES[kind] :] = words.flatten(-2)
    return made


def _groups(data: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Some groups of as many rows at a time, [G, rows, bytes of a row], and the rows of each."""
    whole = data.shape[0] // GROUP_ROWS * GROUP_ROWS
    for start in range(0, whole, ROWS_AT_ONCE):
        yield (
            data[start : min(whole, start + ROWS_AT_ONCE)].unflatten(0, (-1, GROUP_ROWS)),
            GROUP_ROWS,
        )
    if whole < data.shape[0]:
        yield data[whole:].unsqueeze(0), data.shape[0] - whole


def _parts(woven: Tensor, rows: int, kind: str) -> tuple[Tensor, Tensor]:
    """Views of groups: scales [G, B, S, rows, 2 bytes] and words [G, B, Q, rows, 4 bytes]."""
    blocks = woven.view(len(woven), -1, rows * BLOCK_BYTES[kind])
    scales = rows * SCALE_BYTES[kind]
    return (
        blocks[..., :scales].unflatten(-1, (-1, rows, 2)),
        blocks[..., scales:].unflatten(-1, (-1, rows, 4)),
    )


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A matrix [N, K] in fewer bits, for inference.

    Attributes:
        data: [N, K], int8; or the blocks' bytes [N, K / 32 * bytes of a block], uint8, woven
            (:func:`weave_blocks_`).
        kind: "int8", "q4_0", "q4_1" or "q8_0".
        dtype: of the activations, and what the matrix would be held in densely. Blocks stand for the
            file's numbers, whatever it is.
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

    def rows(self, index: Tensor) -> Tensor:
        """The rows ``index [n]`` in fp32, ``[n, K]``."""
        if self.scale is not None:
            return self.data[index].float() * self.scale[index].float().unsqueeze(1)
        # Whole groups are opened, of which one row each is wanted.
        N = self.shape[0]
        whole = N // GROUP_ROWS * GROUP_ROWS
        lanes = torch.arange(GROUP_ROWS, device=index.device)
        group = index // GROUP_ROWS * GROUP_ROWS
        made = torch.empty(len(index), self.shape[1], device=self.data.device)
        inside = index < whole
        if bool(inside.any()):
            data = self.data[(group[inside].unsqueeze(1) + lanes).flatten()]
            opened = _opened(data, self.kind).unflatten(0, (-1, GROUP_ROWS))
            made[inside] = opened[torch.arange(len(opened)), index[inside] - group[inside]]
        if not bool(inside.all()):
            made[~inside] = _opened(self.data[whole:], self.kind)[index[~inside] - whole]
        return made

    def dequantized(self) -> Tensor:
        """``w [N, K]`` in fp32: of int8 ``scale [N] * data``."""
        if self.scale is not None:
            return self.data.float() * self.scale.float().unsqueeze(1)
        return _opened(self.data, self.kind)


def _opened(data: Tensor, kind: str) -> Tensor:
    """The numbers of woven blocks, fp32."""
    if data.numel() == 0:
        return torch.zeros(data.shape[0], data.shape[1] // BLOCK_BYTES[kind] * BLOCK)
    import gguf

    plain = unwoven_blocks(data.detach(), kind)
    return torch.from_numpy(
        gguf.quants.dequantize(plain.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    )
