"""``export``: a cut model, or any checkpoint, as one Hugging Face folder.

The ranks write the boxes they hold, side by side, and then share out the output files: who writes one
reads its tensors whole, one at a time. So a rank holds its share of the model and one tensor, however
many ranks the model is cut over; the disk holds the model twice for a while. How the folder appears:
:mod:`pyparallel.checkpoint.place`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from pyparallel.checkpoint.paths import naming, to_disk
from pyparallel.checkpoint.place import Place
from pyparallel.checkpoint.source import Checkpoint, CheckpointError, open_checkpoint
from pyparallel.comm.exchange import gather_objects
from pyparallel.comm.peer_watch import naming_lost_peers
from pyparallel.cut.shard import REPLICATED
from pyparallel.mesh import Mesh
from pyparallel.models.fill import NOT_LOADED
from pyparallel.saving.exchange import together
from pyparallel.saving.files import set_dtype, source_of, write_files
from pyparallel.saving.names import unwrap
from pyparallel.saving.save import save

MAX_FILE_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"
# What a safetensors file calls its types.
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file: the names, shapes and dtypes of what is in it, in order."""

    name: str
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]


def export(
    model: nn.Module | Sequence[nn.Module],
    folder: str | Path,
    mesh: Mesh,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a cut model as transformers would write the dense one; called by every rank of the mesh.

    The folder has config.json, the tokenizer's files where they are known, and model.safetensors, or
    several files and their index. Names, shapes and bits are those of the folder the model came from,
    where nothing was trained; of a GGUF, those of the dequantised tensors.

    Args:
        model, source, overwrite: as :func:`pyparallel.save` takes them.
        dtype: of the tensors; by default as they are.
        max_file_bytes: no file is larger, unless a tensor is.

    Raises:
        CheckpointError: on every rank, if any rank fails; there is no config.json to be found.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    rank = dist.get_rank()

    def begin() -> Place | None:
        chain = unwrap(models[0])
        found = source_of(source, chain)
        if found is None and not hasattr(getattr(chain[-1], "config", None), "save_pretrained"):
            raise CheckpointError(
                f"{folder}: this model was not loaded from a folder, so its config.json is not known; "
                f"give source=, a folder that has it"
            )
        return Place(folder, overwrite=overwrite, source=found) if rank == 0 else None

    place = together(begin, f"export to {folder}")
    try:
        with naming_lost_peers(f"export to {folder}"):
            mine = place and [str(place.working), place.suffix]
            told = gather_objects(dist.group.WORLD, mine)[0]
        where = Path(told[0])
        boxes = where / "boxes"
        save(models, boxes, mesh, source=source)
        checkpoint = together(lambda: open_checkpoint(boxes))
        files = split_files(checkpoint, dtype, max_file_bytes, suffix=told[1])
        together(lambda: rank == 0 and _begin(where, checkpoint, files))
        together(lambda: _fill(where, checkpoint, files[rank :: dist.get_world_size()]))

        def finish() -> None:
            if place is not None:
                shutil.rmtree(boxes)
                place.appear(_finish(where, files))

        together(finish)
    except CheckpointError:
        if place is not None:
            place.close()
        raise


def export_checkpoint(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint (one that ``save`` wrote, or a GGUF) as a Hugging Face folder, alone.

    Args:
        dtype, max_file_bytes, overwrite: as :func:`export` takes them.

    Raises:
        CheckpointError: the folder is there already, or the checkpoint has no config.
    """
    checkpoint.config()
    place = Place(folder, overwrite=overwrite, source=checkpoint.path)
    try:
        files = split_files(checkpoint, dtype, max_file_bytes, suffix=place.suffix)
        _begin(place.working, checkpoint, files)
        _fill(place.working, checkpoint, files)
        place.appear(_finish(place.working, files))
    finally:
        place.close()


def split_files(
    checkpoint: Checkpoint, dtype: torch.dtype | None, max_file_bytes: int, *, suffix: str = ""
) -> list[OutputFile]:
    """The output files of a checkpoint, in the order of the names, numbers by value.

    Args:
        suffix: of each name but a single file's, which becomes valid by itself.
    """
    groups: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    held = 0
    for name in sorted(checkpoint.shapes, key=_natural):
        if name.endswith(NOT_LOADED):
            continue
        shape, kind = checkpoint.shapes[name], checkpoint.dtype(name)
        kind = dtype if dtype is not None and kind.is_floating_point else kind
        size = math.prod(shape) * kind.itemsize
        if groups[-1] and held + size > max_file_bytes:
            groups.append({})
            held = 0
        groups[-1][name] = (shape, kind)
        held += size
    if len(groups) == 1:
        return [OutputFile("model.safetensors", groups[0])]
    return [
        OutputFile(f"model{suffix}-{number:05}-of-{len(groups):05}.safetensors", group)
        for number, group in enumerate(groups, 1)
    ]


def _begin(working: Path, checkpoint: Checkpoint, files: Sequence[OutputFile]) -> None:
    """Everything but the tensors."""
    with naming(working):
        write_files(working, None, checkpoint.path)
        kinds = [kind for file in files for _, kind in file.tensors.values()]
        set_dtype(working, next((k for k in kinds if k.is_floating_point), torch.float32))


def _fill(working: Path, checkpoint: Checkpoint, files: Sequence[OutputFile]) -> None:
    for file in files:
        with naming(working / file.name):
            write_safetensors(working / file.name, file.tensors, checkpoint)
            to_disk(working / file.name)


def _finish(working: Path, files: Sequence[OutputFile]) -> str:
    """The name of the file that makes the others valid, written now if need be."""
    if len(files) == 1:
        return files[0].name
    with naming(working):
        _write_index(working / _INDEX, files)
    return _INDEX


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    checkpoint: Checkpoint,
) -> None:
    """Write one file, of which only a tensor at a time is in memory.

    The format (huggingface.co/docs/safetensors): the header's length as 8 bytes, little endian; the
    header, JSON padded with spaces to a multiple of 8; the tensors' bytes. The widest types come first,
    so that every tensor is aligned to its type.
    """
    order = sorted(tensors, key=lambda name: -tensors[name][1].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, kind = tensors[name]
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": _TYPES[kind], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = checkpoint.read(name, REPLICATED, 0, dtype=tensors[name][1])
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def _write_index(path: Path, files: Iterable[OutputFile]) -> None:
    places = {name: file.name for file in files for name in file.tensors}
    sizes = [
        (math.prod(shape), kind.itemsize) for file in files for shape, kind in file.tensors.values()
    ]
    metadata = {
        "total_parameters": sum(count for count, _ in sizes),
        "total_size": sum(count * size for count, size in sizes),
    }
    content = {"metadata": metadata, "weight_map": places}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
