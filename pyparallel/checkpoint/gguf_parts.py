"""The files that a GGUF is split into, as gguf-split names them: ``NAME-00001-of-00003.gguf``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pyparallel.checkpoint.format import CheckpointError
from pyparallel.checkpoint.gguf_header import Header, read_header
from pyparallel.checkpoint.schema import shown

_NAME = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def first_part(names: Sequence[str]) -> str | None:
    """Which of a folder's GGUF files to open: the one, or the first part of the one that is split."""
    if len(names) == 1:
        return names[0]
    found = [_NAME.fullmatch(name) for name in names]
    kinds = {(match["name"], match["count"]) if match else None for match in found}
    return min(names) if len(kinds) == 1 and None not in kinds else None


def read_parts(path: Path) -> list[tuple[Path, Header]]:
    """The headers of a GGUF file and of the other parts of it, in order.

    Raises:
        CheckpointError: one is broken or missing, or ``path`` is not the first.
    """
    header = read_header(path)
    count, number = (header.metadata.get(key, 0) for key in ("split.count", "split.no"))
    whole = isinstance(count, int) and isinstance(number, int)
    if not whole or not 0 <= number < max(count, 1) or count > 99999:
        raise CheckpointError(
            f"{path}: split.count, split.no: expected a number and its count, got "
            f"{shown(number)} of {shown(count)}"
        )
    if count <= 1:
        return [(path, header)]
    match = _NAME.fullmatch(path.name)
    name = match["name"] if match else path.stem
    files = [path.with_name(f"{name}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if path.name != files[number].name:
        raise CheckpointError(
            f"{path}: is part {number + 1} of {count}; expected its name to be {files[number].name}, "
            f"so that the others can be found"
        )
    missing = [file.name for file in files if not file.exists()]
    if missing:
        more = f" and {len(missing) - 3} others" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{path}: is part {number + 1} of {count}, and {', '.join(missing[:3])}{more} "
            f"{'is' if len(missing) == 1 else 'are'} missing beside it"
        )
    if number:
        raise CheckpointError(
            f"{path}: is part {number + 1} of {count}; name the first, {files[0].name}"
        )
    parts = [(path, header), *((file, read_header(file)) for file in files[1:])]
    for place, (file, part) in enumerate(parts):
        found = part.metadata.get("split.no"), part.metadata.get("split.count")
        if found != (place, count):
            raise CheckpointError(
                f"{file}: split.no, split.count: expected {place} of {count}, got {shown(found[0])} of "
                f"{shown(found[1])}"
            )
    held = sum(len(part.tensors) for _, part in parts)
    if header.metadata.get("split.tensors.count", held) != held:
        raise CheckpointError(
            f"{path}: split.tensors.count: expected {shown(header.metadata['split.tensors.count'])} "
            f"tensors in its {count} parts, got {held}"
        )
    return parts
