"""Which files of a folder are read: transformers' choice, written down in docs/checkpoints.md.

    config.json's transformers_weights, where it names a file;
    else model.safetensors;
    else model.safetensors.index.json, and of each tensor the file that its weight_map names.

Nothing else is read. A name that a file gives leads to a file inside the folder; see :func:`inside`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed as dist

from pyparallel.checkpoint.format import CheckpointError, read_json, regular_file
from pyparallel.checkpoint.schema import CONFIG, GENERATION, Key, check_keys, check_numbers, shown

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# Of a config.json; one with the names of 20,000 classes has 2 MB.
CONFIG_BYTES = 16 << 20
# Of a file below a folder; longer ones are no names on any file system.
MAX_NAME = 1024

_told: set[Path] = set()


@dataclass(frozen=True)
class Choice:
    """What is read.

    Attributes:
        files: sorted; each is a regular file.
        weight_map: the file of each tensor that is read, or None: all that are in the one file.
        left_out: safetensors files and indexes of the folder that are not read.
        dtype: what the index says of the tensors, where it does.
    """

    files: tuple[Path, ...]
    weight_map: Mapping[str, Path] | None
    left_out: tuple[str, ...]
    dtype: str | None = None


def choose(folder: Path) -> Choice:
    """The files of a folder that a model's tensors are read from.

    Raises:
        CheckpointError: there are none, one is missing, or lies outside the folder.
    """
    name = _named_by_config(folder)
    if name is None:
        found = [name for name in (WEIGHTS, WEIGHTS_INDEX) if (folder / name).exists()]
        if not found:
            others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:5])
            raise CheckpointError(
                f"{folder}: expected {WEIGHTS} or {WEIGHTS_INDEX}, as transformers does, got {others}; "
                f"name the one file to read, or rename it"
            )
        name = found[0]
    weight_map = dtype = None
    if name.endswith(".index.json"):
        weight_map, dtype = _read_index(folder, name)
        files = sorted(set(weight_map.values()))
    else:
        files = [folder / name]
    for file in files:
        regular_file(file)
    read = {name, *(str(file.relative_to(folder)) for file in files)}
    there = {file.name for kind in ("*.safetensors", "*.index.json") for file in folder.glob(kind)}
    left_out = tuple(sorted(there - read - {"pyparallel.index.json"}))
    return Choice(tuple(files), weight_map, left_out, dtype)


def _named_by_config(folder: Path) -> str | None:
    """transformers_weights of a config.json."""
    config = folder / "config.json"
    name = read_config(config).get("transformers_weights") if config.exists() else None
    if name is None:
        return None
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"{config}: transformers_weights: expected a name that ends in .safetensors or "
            f".safetensors.index.json, got {shown(name)}"
        )
    return str(inside(folder, name, f"{config}: transformers_weights").relative_to(folder))


def _read_index(folder: Path, name: str) -> tuple[dict[str, Path], str | None]:
    """The file of each tensor, and the tensors' dtype."""
    file = folder / name
    content = read_json(file)
    _checked(str(file), content, {"metadata": Key("object", null=True)})
    metadata = content.get("metadata") or {}
    _checked(f"{file}: metadata", metadata, {"dtype": Key("str", null=True)})
    weights = content.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(
            f"{file}: weight_map: expected an object of tensors and their files, got {shown(weights)}"
        )
    places: dict[str, Path] = {}
    for tensor, part in weights.items():
        if not isinstance(part, str):
            raise CheckpointError(
                f"{file}: weight_map: expected a file's name for tensor {shown(tensor)}, got "
                f"{shown(part)}"
            )
        if part not in places:
            places[part] = inside(folder, part, f"{file}: weight_map")
    return {tensor: places[part] for tensor, part in weights.items()}, metadata.get("dtype")


def inside(folder: Path, name: str, where: str) -> Path:
    """The file that ``name`` names in a folder.

    A name that comes from a file is relative, without "..", and its file lies inside the folder, links
    followed. A link may also end in the ``blobs`` of Hugging Face's cache: beside the ``snapshots`` that
    the folder is of, or in any ``models--*/blobs``, where a downloader puts what such a link names.

    Args:
        where: what gave the name, for the message.

    Raises:
        CheckpointError: it leads elsewhere.
    """
    parts = PurePosixPath(name).parts
    plain = (
        0 < len(name) <= MAX_NAME
        and "\0" not in name
        and not name.startswith("/")
        and ".." not in parts
    )
    if not plain or name in (".", "./"):
        raise CheckpointError(
            f"{where}: expected a name inside {folder}, without '..', got {shown(name)}"
        )
    file = folder / name
    try:
        home, place = folder.resolve(), file.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{where}: {shown(name)} can't be followed ({error})") from None
    if place.is_relative_to(home):
        return file
    blobs = place.parent
    beside = home.parent.name == "snapshots" and blobs == home.parent.parent / "blobs"
    cached = blobs.name == "blobs" and blobs.parent.name.startswith(("models--", "datasets--"))
    if not beside and not cached:
        raise CheckpointError(
            f"{where}: expected a file inside {folder}, got {shown(name)}, a link to {place}; copy the "
            f"file, or link the folder as a whole"
        )
    return file


def read_config(file: Path) -> dict[str, Any]:
    """A config.json, whose keys that are read for every model have their types.

    Raises:
        CheckpointError: it can't be read, or a key is something else.
    """
    config = read_json(file, max_bytes=CONFIG_BYTES)
    _checked(str(file), config, CONFIG)
    try:
        check_numbers(str(file), config)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if config.get("quantization_config"):
        method = shown(config["quantization_config"].get("quant_method"))
        raise CheckpointError(
            f"{file}: quantization_config: expected none, since quantised tensors of Hugging Face are "
            f"not read; got method {method}. Load the dense model, or a GGUF"
        )
    return config


def read_generation_config(folder: Path) -> dict[str, Any]:
    """A folder's generation_config.json, or {}.

    Raises:
        CheckpointError: it can't be read, or a key is something else.
    """
    file = folder / "generation_config.json"
    if not file.exists():
        return {}
    content = read_json(file, max_bytes=CONFIG_BYTES)
    _checked(str(file), content, GENERATION)
    return content


def _checked(where: str, content: Mapping[str, Any], table: Mapping[str, Any]) -> None:
    try:
        check_keys(where, content, table)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def tell_left_out(folder: Path, choice: Choice) -> None:
    """Name what is not read: once a process, and once a job."""
    if not choice.left_out or folder in _told:
        return
    _told.add(folder)
    if int(os.environ.get("RANK", 0)) or (dist.is_initialized() and dist.get_rank()):
        return
    read = ", ".join(str(file.relative_to(folder)) for file in choice.files[:3])
    more = f" and {len(choice.files) - 3} more" if len(choice.files) > 3 else ""
    warnings.warn(
        f"{folder}: reads {read}{more}; left out: {', '.join(choice.left_out)}", stacklevel=4
    )
