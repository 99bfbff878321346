"""Files of tensors that stay open while a checkpoint is read: each header once, each box by pread.

What is read lands in its place; nothing is mapped, so that a rank's memory is what it holds and a piece
of :data:`PIECE_BYTES`. A box whose rows lie far apart in the file is read row by row, and the kernel is
told not to read ahead: a rank that holds an eighth leaves the rest on the disk.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyparallel.checkpoint.format import CheckpointError, open_safetensors, regular_file

# Descriptors of one checkpoint at a time; the one that was used longest ago makes room.
MAX_OPEN = 64
# What the library bounds a header by.
MAX_HEADER_BYTES = 100_000_000
# Of the temporary copy of what does not lie in the file as it will in memory, in bytes.
PIECE_BYTES = 1 << 20
# Rows with at least so many unwanted bytes between them are read one by one: 4 pages, since the kernel
# reads whole pages and a call takes as long as copying one.
HOLE_BYTES = 16 << 10


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file.

    Attributes:
        kind: its type, as safetensors calls it.
        offset: of its first byte in the file.
    """

    kind: str
    shape: tuple[int, ...]
    offset: int


class TensorFiles:
    """The files of a checkpoint, of which at most :data:`MAX_OPEN` are open.

    A copy by pickle has the headers and no descriptor. :meth:`close` gives the descriptors back; a read
    after it opens them again, and tells a file that is another one by now.
    """

    def __init__(self) -> None:
        self._headers: dict[Path, dict[str, Place]] = {}
        self._metadata: dict[Path, dict[str, str]] = {}
        self._identities: dict[Path, tuple[int, int, int]] = {}
        self._open: OrderedDict[Path, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor."""
        while self._open:
            os.close(self._open.popitem()[1])

    def header(self, file: Path) -> dict[str, Place]:
        """The tensors of a safetensors file by their names; the file is parsed once.

        Raises:
            CheckpointError: there is none, or it is not whole.
        """
        if file not in self._headers:
            # By the descriptor, so that what the library checks is what is read.
            opened = self._descriptor(file)
            # The library maps the file, and what is mapped is read far ahead where a page is missing, or
            # marked by an earlier reading ahead: the header is there before, and nothing else.
            os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_RANDOM)
            size = int.from_bytes(os.pread(opened, 8, 0), "little")
            header = 8 + min(size, MAX_HEADER_BYTES)
            os.posix_fadvise(opened, 0, header, os.POSIX_FADV_WILLNEED)
            with open_safetensors(Path(f"/proc/self/fd/{opened}"), shown=file):
                pass
            entries = json.loads(_exactly(file, opened, 8, size).numpy().tobytes())
            self._metadata[file] = entries.pop("__metadata__", {})
            self._headers[file] = {
                name: Place(
                    entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
                )
                for name, entry in entries.items()
            }
        return self._headers[file]

    def metadata(self, file: Path) -> Mapping[str, str]:
        """What a safetensors file says of itself.

        Raises:
            CheckpointError: as :meth:`header`.
        """
        self.header(file)
        return self._metadata[file]

    def rows_at(
        self, file: Path, offset: int, rows: int, row_bytes: int, skip: int, wanted: int
    ) -> Tensor:
        """Of rows one after another from ``offset`` on, of each ``wanted`` bytes from ``skip`` on.

        Returns:
            uint8 ``[rows, wanted]``.

        Raises:
            CheckpointError: it can't be read, ended before, or is another one than before.
        """
        opened = self._descriptor(file)
        alone = _alone(row_bytes, wanted)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_RANDOM if alone else os.POSIX_FADV_NORMAL)
        return _rows(file, opened, offset, rows, row_bytes, skip, wanted)

    def read_box(
        self, file: Path, place: Place, dtype: torch.dtype, starts: Sequence[int], out: Tensor
    ) -> None:
        """Fill ``out`` with the box of its shape that begins at ``starts`` of a tensor, converted.

        Raises:
            CheckpointError: as :meth:`rows_at`.
        """
        if out.numel() == 0:
            return
        if out.dim() == 0:
            out, starts, shape = out.unsqueeze(0), (0,), (1,)
        else:
            shape = place.shape
        opened, item = self._descriptor(file), dtype.itemsize
        cut = max((i for i, n in enumerate(shape) if out.shape[i] != n), default=0)
        # What follows a part is another rank's, and is not read ahead.
        part = out.numel() < math.prod(shape)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_RANDOM if part else os.POSIX_FADV_NORMAL)
        # Rows along this axis; of each, a run of bytes.
        axis = max(cut - 1, 0)
        strides = [math.prod(shape[i + 1 :]) * item for i in range(len(shape))]
        for index in itertools.product(*map(range, out.shape[:axis])):
            first = [i + start for i, start in zip(index, starts[:axis], strict=True)]
            base = place.offset + sum(i * stride for i, stride in zip(first, strides, strict=False))
            base += starts[axis] * strides[axis]
            skip = starts[cut] * strides[cut] if cut else 0
            _read_rows(file, opened, base, strides[axis], skip, dtype, out[index] if index else out)

    def _descriptor(self, file: Path) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        regular_file(file)
        try:
            # Opened so that a fifo that took the file's place since would not make us wait.
            opened = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{file}: can't be read ({error})") from None
        found = os.fstat(opened)
        identity = found.st_ino, found.st_size, found.st_mtime_ns
        if self._identities.setdefault(file, identity) != identity:
            os.close(opened)
            raise CheckpointError(f"{file}: it was replaced while it was read; load it again")
        if len(self._open) >= MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[file] = opened
        return opened


def _read_rows(
    file: Path, opened: int, base: int, row_bytes: int, skip: int, dtype: torch.dtype, out: Tensor
) -> None:
    """Fill ``out`` with rows that lie ``row_bytes`` apart, of each what begins ``skip`` bytes on."""
    rows, wanted = out.shape[0], out[0].numel() * dtype.itemsize
    dense = wanted == row_bytes
    if dense and out.dtype == dtype and out.is_contiguous() and out.device.type == "cpu":
        _fill(file, opened, base, out.detach().view(-1).view(torch.uint8))
        return
    alone = _alone(row_bytes, wanted)
    if not alone:
        # A file that is not read ahead is under way as a whole before the first piece is waited for.
        os.posix_fadvise(opened, base, rows * row_bytes, os.POSIX_FADV_WILLNEED)
    step = max(1, PIECE_BYTES // (wanted if alone else row_bytes))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        piece = _rows(file, opened, base + start * row_bytes, stop - start, row_bytes, skip, wanted)
        out[start:stop].copy_(piece.view(-1).view(dtype).view(out[start:stop].shape))


def _alone(row_bytes: int, wanted: int) -> bool:
    """Whether rows are read one by one, without what lies between."""
    return row_bytes - wanted >= HOLE_BYTES


def _rows(
    file: Path, opened: int, base: int, rows: int, row_bytes: int, skip: int, wanted: int
) -> Tensor:
    """``wanted`` bytes of each of some rows, as :func:`_read_rows` counts: uint8 ``[rows, wanted]``."""
    if not _alone(row_bytes, wanted):
        whole = _exactly(file, opened, base, rows * row_bytes).view(rows, row_bytes)
        return whole[:, skip : skip + wanted].contiguous()
    found = torch.from_numpy(np.empty((rows, wanted), np.uint8))
    places = [base + row * row_bytes + skip for row in range(rows)]
    # All of them under way before the first is waited for.
    for place in places:
        os.posix_fadvise(opened, place, wanted, os.POSIX_FADV_WILLNEED)
    for row, place in enumerate(places):
        _fill(file, opened, place, found[row])
    return found


def _exactly(file: Path, opened: int, offset: int, count: int) -> Tensor:
    # By malloc, which gives a large piece back whole; torch's alignment leaves holes in the heap.
    out = torch.from_numpy(np.empty(count, np.uint8))
    _fill(file, opened, offset, out)
    return out


def _fill(file: Path, opened: int, offset: int, out: Tensor) -> None:
    """Fill bytes from a file; one call reads at most 2 GB."""
    rest = memoryview(out.numpy())
    while rest:
        try:
            count = os.preadv(opened, [rest], offset)
        except OSError as error:
            raise CheckpointError(f"{file}: can't be read ({error})") from None
        if count == 0:
            raise CheckpointError(f"{file}: it became shorter while it was read")
        rest, offset = rest[count:], offset + count
