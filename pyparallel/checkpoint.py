"""Reading checkpoints by slices: safetensors (one file, or several with an index), GGUF, and what
:func:`pyparallel.save` wrote.

A checkpoint lists dense tensors under their Hugging Face names and reads any ranges of one axis of one
of them, so that a rank never holds more than its own share and one tensor. No pickle is ever read.
Opened checkpoints are small and picklable: a launcher opens one and hands it to its ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyparallel.checkpoint_format import (
    Checkpoint,
    CheckpointError,
    open_safetensors,
    read_json,
)
from pyparallel.sharded_checkpoint import ShardedCheckpoint, is_sharded

__all__ = ["Checkpoint", "CheckpointError", "SafetensorsCheckpoint", "open_checkpoint"]


class SafetensorsCheckpoint(Checkpoint):
    """A folder with config.json and model.safetensors, or shards with an index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        folder = path if path.is_dir() else path.parent
        index = folder / "model.safetensors.index.json"
        if path.is_file():
            files = [path]
        elif index.exists():
            files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
        else:
            files = sorted(folder.glob("*.safetensors"))
        self._config_file = folder / "config.json"
        self._files: dict[str, Path] = {}
        self.shapes = {}
        for file in files:
            with open_safetensors(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                    self._files[name] = file
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
        if index.exists() and not path.is_file():
            for name in read_json(index)["weight_map"]:
                if name not in self.shapes:
                    raise CheckpointError(f"{path}: tensor {name} of the index is in no file")

    def config(self) -> Mapping[str, Any]:
        if not self._config_file.exists():
            raise CheckpointError(f"{self.path}: there is no config.json beside the tensors")
        return read_json(self._config_file)

    def dtype(self, name: str) -> torch.dtype:
        with open_safetensors(self._files[name]) as tensors:
            rows = tensors.get_slice(name)
            return rows[:0].dtype if rows.get_shape() else tensors.get_tensor(name).dtype

    def _copy(self, name: str, dim: int, start: int, out: Tensor) -> None:
        # Opened anew for each tensor: closing unmaps the pages that were read, which would otherwise
        # add up to the whole file.
        with open_safetensors(self._files[name]) as tensors:
            if not self.shapes[name]:
                out.copy_(tensors.get_tensor(name))
                return
            held = (slice(None),) * dim + (slice(start, start + out.shape[dim]),)
            out.copy_(tensors.get_slice(name)[held])


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder of safetensors, one that ``save`` wrote, a .safetensors file or a .gguf file.

    Raises:
        CheckpointError: nothing is there, or it is of another kind, or truncated.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if is_sharded(path):
        return ShardedCheckpoint(path)
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
