"""Reading checkpoints by slices: safetensors (one file, or several with an index) and GGUF.

A checkpoint lists dense tensors under their Hugging Face names and reads any ranges of one axis of one
of them, so that a rank never holds more than its own share and one tensor. No pickle is ever read.
Opened checkpoints are small and picklable: a launcher opens one and hands it to its ranks.
"""

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
        shape = self._shape(name, sharding)
        if sharding.local_shape(shape, rank) != tuple(out.shape):
            raise CheckpointError(
                f"{self.path}: tensor {name} of shape {shape} does not give this model's "
                f"{tuple(out.shape)}"
            )
        if sharding.dim is None:
            self._copy(name, 0, 0, out)
            return
        filled = 0
        for start, stop in sharding.ranges[rank]:
            part = out.narrow(sharding.dim, filled, stop - start)
            self._copy(name, sharding.dim, start, part)
            filled += stop - start

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


class SafetensorsCheckpoint(Checkpoint):
    """A folder with config.json and model.safetensors, or shards with an index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        folder = path if path.is_dir() else path.parent
        index = folder / "model.safetensors.index.json"
        if path.is_file():
            files = [path]
        elif index.exists():
            files = sorted({folder / name for name in _json(index)["weight_map"].values()})
        else:
            files = sorted(folder.glob("*.safetensors"))
        self._config_file = folder / "config.json"
        self._files: dict[str, Path] = {}
        self.shapes = {}
        for file in files:
            with _open_safetensors(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                    self._files[name] = file
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
        if index.exists() and not path.is_file():
            for name in _json(index)["weight_map"]:
                if name not in self.shapes:
                    raise CheckpointError(f"{path}: tensor {name} of the index is in no file")

    def config(self) -> Mapping[str, Any]:
        if not self._config_file.exists():
            raise CheckpointError(f"{self.path}: there is no config.json beside the tensors")
        return _json(self._config_file)

    def dtype(self, name: str) -> torch.dtype:
        with _open_safetensors(self._files[name]) as tensors:
            rows = tensors.get_slice(name)
            return rows[:0].dtype if rows.get_shape() else tensors.get_tensor(name).dtype

    def _copy(self, name: str, dim: int, start: int, out: Tensor) -> None:
        # Opened anew for each tensor: closing unmaps the pages that were read, which would otherwise
        # add up to the whole file.
        with _open_safetensors(self._files[name]) as tensors:
            if not self.shapes[name]:
                out.copy_(tensors.get_tensor(name))
                return
            held = (slice(None),) * dim + (slice(start, start + out.shape[dim]),)
            out.copy_(tensors.get_slice(name)[held])


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder of safetensors, a .safetensors file or a .gguf file.

    Raises:
        CheckpointError: nothing is there, or it is of another kind, or truncated.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        from pyparallel.gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return open_checkpoint(ggufs[0])
        if ggufs:
            names = ", ".join(file.name for file in ggufs)
            raise CheckpointError(f"{path}: holds several GGUF files; name one of {names}")
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        raise CheckpointError(
            f"{path}: no *.safetensors or *.gguf file in it"
            + ("; pickled weights are not read, convert them to safetensors" if pickled else "")
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: expected a folder, a .safetensors or a .gguf file")
    return SafetensorsCheckpoint(path)


def _open_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error})") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from None
