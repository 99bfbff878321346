"""Weights as the CPU kernels take them: addresses, and the numbers of their precisions."""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel.cut.quantize import BLOCK_BYTES, PackedWeight

# As numbered by Precision in csrc/cpu/kernels/kernels.h.
PRECISIONS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2} | {
    kind: code for code, kind in enumerate(("int8", *BLOCK_BYTES), 3)
}


def weight_argument(
    name: str,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    held: list[Tensor],
    copies: list[tuple[Tensor, Tensor]] | None = None,
) -> tuple[int, int, int, int, int]:
    """A weight as the kernels take it: (data, precision, bias, scale, rows).

    Args:
        held: gets what has to live as long as the addresses are in use: aliases, so that a parameter
            may be given other data.
        copies: gets (source, copy) of what had to be copied.
    """
    N = weight.shape[0]
    data, scale, precision = weight, None, form(weight)
    if isinstance(weight, PackedWeight):
        data, scale = weight.data, weight.scale
    if precision not in PRECISIONS:
        raise ValueError(f"{name}: expected fp32, bf16, fp16 or a PackedWeight, got {precision}")
    addresses = []
    for part in (bias, scale):
        if part is not None:
            expect(part.shape == (N,), f"{name}'s bias or scale", (N,), tuple(part.shape))
            hold(part, widened(part.detach()), held, copies)
        addresses.append(0 if part is None else held[-1].data_ptr())
    hold(data, data.detach().contiguous(), held, copies)
    return held[-1].data_ptr(), PRECISIONS[precision], *addresses, N


def hold(
    source: Tensor,
    as_read: Tensor,
    held: list[Tensor],
    copies: list[tuple[Tensor, Tensor]] | None,
) -> None:
    """Keep ``as_read``, which kernels read for ``source``, and note it where it is a copy."""
    held.append(as_read)
    if copies is not None and as_read.data_ptr() != source.data_ptr():
        copies.append((source.detach(), as_read))


def form(weight: Tensor | PackedWeight) -> torch.dtype | str:
    """What holds a weight's numbers, as ``PRECISIONS`` has it."""
    return weight.kind if isinstance(weight, PackedWeight) else weight.dtype


def widened(x: Tensor) -> Tensor:
    """``x`` in fp32, contiguous."""
    if x.dtype is torch.float32 and x.is_contiguous():
        return x
    return x.detach().float().contiguous()


def expect(ok: bool, name: str, expected: object, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")
