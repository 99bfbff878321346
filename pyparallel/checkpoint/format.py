"""What every checkpoint format gives: shapes, dtypes, and slices read straight into their place."""

from __future__ import annotations

import json
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyparallel.cut.shard import Sharding

# Of a config.json, an index of transformers', and the like: the largest known are below 20 MB.
MAX_JSON_BYTES = 64 << 20

# What safetensors calls the types.
SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


# Longer than any file's name: no folder's, tensor's or key's name that a person wrote is.
_LONG_NAME = re.compile(r"[^\s/]{256,}")


class CheckpointError(ValueError):
    """A checkpoint is missing, broken, or does not fit the model; the message names what.

    Names come out of files, where they may have any length: one that nobody could read is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_LONG_NAME.sub(lambda name: name.group()[:80] + "...", message))


class Checkpoint(ABC):
    """Dense tensors in files.

    Attributes:
        path: what was opened.
        shapes: the dense shape of every tensor, by its Hugging Face name.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The model's configuration: a config.json, or GGUF metadata."""

    @abstractmethod
    def _copy(self, name: str, dim: int, start: int, out: Tensor) -> None:
        """Fill ``out`` with the tensor's indices from ``start`` on of axis ``dim``."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is open; a read opens it again."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """What a tensor's values are stored as (fp32 where they are quantised)."""

    def read(
        self, name: str, sharding: Sharding, rank: int, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Rank's shard of the tensor ``name``, in ``dtype`` or as stored.

        Raises:
            CheckpointError: there is no such tensor, or its size is not the sharding's.
        """
        shape = sharding.local_shape(self._shape(name, sharding), rank)
        out = torch.empty(shape, dtype=dtype or self.dtype(name))
        self.read_into(out, name, sharding, rank)
        return out

    def read_into(self, out: Tensor, name: str, sharding: Sharding, rank: int) -> None:
        """Fill ``out`` with rank's shard of the tensor ``name``, converted to its dtype.

        Raises:
            CheckpointError: there is no such tensor, or its size is not the sharding's or ``out``'s.
        """
        self._check_gives(tuple(out.shape), name, sharding, rank)
        if sharding.dim is None:
            self._copy(name, 0, 0, out)
            return
        filled = 0
        for start, stop in sharding.ranges[rank]:
            part = out.narrow(sharding.dim, filled, stop - start)
            self._copy(name, sharding.dim, start, part)
            filled += stop - start

    def block_kind(self, name: str, sharding: Sharding, rank: int) -> str | None:
        """What the blocks of rank's shard of a matrix are, as :mod:`pyparallel.cut.quantize` names them;
        None where the shard is not one of whole blocks of a known kind.

        Raises:
            CheckpointError: as :meth:`read`.
        """
        return None

    def read_blocks_into(self, out: Tensor, name: str, sharding: Sharding, rank: int) -> None:
        """Fill ``out [rows, bytes]``, uint8, with rank's shard as it is stored.

        Raises:
            CheckpointError: as :meth:`read_into`; :meth:`block_kind` has no name for the shard.
        """
        raise CheckpointError(f"{self.path}: tensor {name} is not one of blocks; read it densely")

    def _check_gives(
        self, wanted: tuple[int, ...], name: str, sharding: Sharding, rank: int
    ) -> None:
        shape = self._shape(name, sharding)
        if sharding.local_shape(shape, rank) != wanted:
            raise CheckpointError(
                f"{self.path}: tensor {name} of shape {shape} does not give this model's {wanted}"
            )

    def _shape(self, name: str, sharding: Sharding) -> tuple[int, ...]:
        """The dense shape of a tensor that a sharding is to cut."""
        if name not in self.shapes:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        shape = self.shapes[name]
        if sharding.dim is not None and shape[sharding.dim] != sharding.length:
            raise CheckpointError(
                f"{self.path}: tensor {name} of shape {shape} should have length "
                f"{sharding.length} on axis {sharding.dim}"
            )
        return shape


def regular_file(file: Path) -> int:
    """The bytes of a regular file, links followed; nothing is opened, so that a fifo can't make us wait.

    Raises:
        CheckpointError: there is none, it may not be read, or it is a folder, device, fifo or socket.
    """
    try:
        found = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: can't be read ({error})") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{file}: expected a regular file, got {_kind(found.st_mode)}")
    if not os.access(file, os.R_OK):
        raise CheckpointError(f"{file}: permission denied")
    return found.st_size


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket"}
    return f"a {kinds.get(stat.S_IFMT(mode), 'device')}"


def open_safetensors(file: Path, *, shown: Path | None = None) -> Any:
    """A safetensors file, mapped to memory; ``shown`` is what messages call it.

    Its header is checked by the library: at most 100 MB, and every tensor's type, shape and place add up
    to exactly the file's bytes.

    Raises:
        CheckpointError: there is none, or it is not whole.
    """
    from safetensors import SafetensorError, safe_open

    regular_file(file)
    shown = shown or file
    try:
        return safe_open(file, "pt")
    except FileNotFoundError:
        raise CheckpointError(f"{shown}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{shown}: not a whole safetensors file ({one_line(error)})"
        ) from None


def stored_type(file: Path, name: str, kind: str) -> torch.dtype:
    """The dtype that safetensors calls ``kind``.

    Raises:
        CheckpointError: it is of a type that torch has not.
    """
    if kind not in SAFETENSORS_TYPES:
        raise CheckpointError(
            f"{file}: tensor {name} is of type {kind}, expected one of {', '.join(SAFETENSORS_TYPES)}"
        )
    return SAFETENSORS_TYPES[kind]


def read_json(file: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it can't be read, is no regular file, is larger than ``max_bytes``, or holds no
            object.
    """
    size = regular_file(file)
    if size > max_bytes:
        raise CheckpointError(
            f"{file}: expected at most {max_bytes} bytes of JSON, got {size}; it is no file of this kind"
        )
    try:
        # Opened so that a fifo that took the file's place since would not make us wait.
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
            content = json.loads(opened.read(max_bytes + 1).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def one_line(error: BaseException | str) -> str:
    """What an error says, on one line of a length that can be read."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "..."
