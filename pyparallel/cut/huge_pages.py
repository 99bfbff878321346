"""Memory of this process in pages of 2 MiB, where the system has them.

Decoding reads all weights once a token. In pages of 4 KiB a core spends much of that time walking page
tables, more so in a virtual machine: docs/decode.md has the figures.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

PAGE_BYTES = 2 << 20
# Where tensors start: a line.
_ALIGNMENT = 64


class HugePages:
    """A block of zeros that tensors are cut from; it lives as long as any of them.

    Where the system gives no huge pages (``/sys/kernel/mm/transparent_hugepage/enabled`` is ``never``,
    or there are none free) these are ordinary ones. A page is taken when it is first written, so
    whoever writes first is its owner.

    Args:
        num_bytes: the most that will be taken, see :func:`taken_bytes`.
    """

    def __init__(self, num_bytes: int) -> None:
        # A page more, since a mapping may begin anywhere.
        self._memory = mmap.mmap(-1, num_bytes + PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        self._next = -start % PAGE_BYTES
        # Not the last page, if it would not be filled.
        whole = num_bytes // PAGE_BYTES * PAGE_BYTES
        if whole > 0:
            with suppress(AttributeError, OSError):
                self._memory.madvise(mmap.MADV_HUGEPAGE, self._next, whole)
        self._end = self._next + num_bytes

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next piece; tensors share no storage.

        Raises:
            ValueError: the block is used up.
        """
        count = torch.Size(shape).numel()
        num_bytes = taken_bytes(count, dtype)
        if self._next + num_bytes > self._end:
            left = self._end - self._next
            raise ValueError(f"shape: expected at most the {left} bytes left, got {num_bytes}")
        if count == 0:
            return torch.zeros(shape, dtype=dtype)
        piece = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=self._next)
        self._next += num_bytes
        return piece.view(shape)


def taken_bytes(count: int, dtype: torch.dtype) -> int:
    """What ``count`` elements take of a block."""
    return -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def zeros(
    shape: Sequence[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch.zeros``; on the CPU, if it fills one, in huge pages."""
    device = torch.get_default_device() if device is None else torch.device(device)
    dtype = dtype or torch.get_default_dtype()
    num_bytes = taken_bytes(torch.Size(shape).numel(), dtype)
    if device.type != "cpu" or num_bytes < PAGE_BYTES:
        return torch.zeros(shape, device=device, dtype=dtype)
    return HugePages(num_bytes).zeros(shape, dtype)
