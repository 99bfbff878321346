"""Reading checkpoints by slices: safetensors (one file, or several with an index), GGUF, and what
:func:`pyparallel.save` wrote.

A checkpoint lists dense tensors under their Hugging Face names and reads any ranges of one axis of one
of them, so that a rank never holds more than its own share and one tensor. No pickle is ever read.
Opened checkpoints are small and picklable: a launcher opens one and hands it to its ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyparallel.checkpoint.choice import (
    Choice,
    choose,
    read_config,
    read_generation_config,
    tell_left_out,
)
from pyparallel.checkpoint.format import (
    Checkpoint,
    CheckpointError,
    one_line,
    stored_type,
)
from pyparallel.checkpoint.place import left_behind
from pyparallel.checkpoint.sharded import INDEX, ShardedCheckpoint
from pyparallel.checkpoint.tensor_files import TensorFiles

__all__ = ["Checkpoint", "CheckpointError", "SafetensorsCheckpoint", "open_checkpoint"]


class SafetensorsCheckpoint(Checkpoint):
    """A folder with config.json and the files that :func:`choose` chooses, or one file of it.

    Attributes:
        index_dtype: what the index says that the tensors are, where it does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        folder = path if path.is_dir() else path.parent
        choice = choose(folder) if path.is_dir() else Choice((path,), None, ())
        self.index_dtype = choice.dtype
        self._config_file = folder / "config.json"
        self._opened = TensorFiles()
        self._files: dict[str, Path] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self.shapes = {}
        for file in choice.files:
            for name, place in self._opened.header(file).items():
                # A file may have copies of tensors that the index names another file for.
                if choice.weight_map is None or choice.weight_map.get(name) == file:
                    self._files[name] = file
                    self._dtypes[name] = stored_type(file, name, place.kind)
                    self.shapes[name] = place.shape
        self.close()
        for name, file in (choice.weight_map or {}).items():
            if name not in self.shapes:
                raise CheckpointError(f"{path}: tensor {name} of the index is not in {file.name}")
        if path.is_dir():
            tell_left_out(folder, choice)

    def config(self) -> Mapping[str, Any]:
        if not self._config_file.exists():
            raise CheckpointError(f"{self.path}: there is no config.json beside the tensors")
        return read_config(self._config_file)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def _copy(self, name: str, dim: int, start: int, out: Tensor) -> None:
        file = self._files[name]
        starts = [start if axis == dim else 0 for axis in range(out.dim())]
        place = self._opened.header(file)[name]
        self._opened.read_box(file, place, self._dtypes[name], starts, out)

    def close(self) -> None:
        self._opened.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder of safetensors, one that ``save`` wrote, a .safetensors file or a .gguf file.

    Which of a folder's files are read, docs/checkpoints.md says.

    Raises:
        CheckpointError: nothing is there, or it is of another kind, or truncated.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder{left_behind(path)}")
        is_folder = path.is_dir()
        names = sorted(os.listdir(path)) if is_folder else []
    except PermissionError:
        raise CheckpointError(f"{path}: permission denied") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{one_line(str(path))}: can't be read ({one_line(error)})") from None
    if is_folder:
        return _open_folder(path, names)
    if path.suffix == ".gguf":
        from pyparallel.checkpoint.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: expected a folder, a .safetensors or a .gguf file")
    return SafetensorsCheckpoint(path)


def _open_folder(path: Path, names: list[str]) -> Checkpoint:
    read_generation_config(path)
    if INDEX in names:
        return ShardedCheckpoint(path)
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return SafetensorsCheckpoint(path)
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        from pyparallel.checkpoint.gguf import GGUFCheckpoint
        from pyparallel.checkpoint.gguf_parts import first_part

        first = first_part(ggufs)
        if first is None:
            raise CheckpointError(
                f"{path}: holds several GGUF files; name one of {', '.join(ggufs)}"
            )
        return GGUFCheckpoint(path / first)
    pickled = any(name.endswith((".bin", ".pt")) for name in names)
    raise CheckpointError(
        f"{path}: no *.safetensors or *.gguf file in it"
        + ("; pickled weights are not read, convert them to safetensors" if pickled else "")
    )
