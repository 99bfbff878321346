"""What every checkpoint format gives: shapes, dtypes, and slices read straight into their place."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyparallel.shard import Sharding


class CheckpointError(ValueError):
    """A checkpoint is missing, broken, or does not fit the model; the message names what."""


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
        """What the blocks of rank's shard of a matrix are, as :mod:`pyparallel.quantize` names them;
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


def open_safetensors(file: Path) -> Any:
    """A safetensors file, mapped to memory.

    Raises:
        CheckpointError: there is none, or it is not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error})") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it can't be read, or is no object.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content
