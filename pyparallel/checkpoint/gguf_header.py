"""The header of a GGUF file, read within the file's own size and checked to the last field.

The gguf package's reader trusts counts, lengths and offsets: it loops and allocates by them. This one
bounds each by the bytes that are left, and reads the values that the decoder asks for. The format:
github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from pyparallel.checkpoint.format import CheckpointError, regular_file
from pyparallel.checkpoint.schema import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# ggml's own limits: dimensions of a tensor, bytes of its name.
MAX_DIMS, MAX_NAME = 4, 63
# The bytes of the shortest entries: a key of a byte and a value; a name of a byte and one dimension.
KEY_BYTES, TENSOR_BYTES = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8
# Lists of numbers that are kept are at most so long; no rank reads a tokenizer's scores.
KEPT_NUMBERS = 4096
# A key's bytes (ggml's limit), a text's (a chat template has some 10,000), a vocabulary's words.
MAX_KEY, KEPT_TEXT, MAX_STRINGS = 65535, 16 << 20, 1 << 24

# Tokens that end a text wherever they are in a vocabulary, as llama.cpp finds them.
END_TEXTS = frozenset(
    text.encode()
    for text in (
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "< EOT >",
        "_<EOT>",
        "[EOT]",
    )
)

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in a file: ``num_bytes`` from ``offset`` on; ``shape`` as torch says it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        metadata: numbers, strings and short lists of numbers; other lists are None.
        end_tokens: the ids of :data:`END_TEXTS` in its vocabulary.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    end_tokens: tuple[int, ...]


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: it is no whole GGUF file, one of the other byte order, or one whose tensors
            overlap, are unaligned or end outside.
    """
    size = regular_file(path)
    if size < 24:
        raise CheckpointError(f"{path}: not a whole GGUF file (it has {size} bytes)")
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _Reader(data).header()
    except _BadFileError as error:
        raise CheckpointError(f"{path}: not a whole GGUF file ({error})") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read ({error})") from None


class _BadFileError(Exception):
    """What is wrong, in a line."""


class _Reader:
    """Reads on from ``at``, never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._at = 0
        self._end_tokens: tuple[int, ...] = ()

    def header(self) -> Header:
        if self._take(4, "magic") != MAGIC:
            raise _BadFileError("it does not begin with GGUF")
        version = self._number("<I", "version")
        if version and version & 0xFFFF == 0:
            raise _BadFileError(
                "it is of the other byte order (big-endian); convert it with gguf-convert-endian"
            )
        if version not in VERSIONS:
            raise _BadFileError(f"expected version 2 or 3, got {version}")
        num_tensors = self._count("tensors", TENSOR_BYTES)
        num_keys = self._count("keys", KEY_BYTES)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string("a key")
            if key in metadata:
                raise _BadFileError(f"key {shown(key)} is there twice")
            metadata[key] = self._value(key, self._number("<I", key))
        alignment = metadata.get("general.alignment", 32)
        power = isinstance(alignment, int) and 0 < alignment < 2**31
        if not power or alignment & (alignment - 1):
            raise _BadFileError(
                f"general.alignment: expected a power of two, got {shown(alignment)}"
            )
        found = [self._tensor() for _ in range(num_tensors)]
        begin = -(-self._at // alignment) * alignment
        placed = _placed(found, begin, alignment, self._size)
        return Header(metadata, placed, self._end_tokens)

    def _tensor(self) -> TensorInfo:
        name = self._string("a tensor's name")
        if not 0 < len(name.encode()) <= MAX_NAME:
            raise _BadFileError(
                f"expected a tensor's name of at most {MAX_NAME} bytes, got {shown(name)}"
            )
        num_dims = self._number("<I", name)
        if not 1 <= num_dims <= MAX_DIMS:
            raise _BadFileError(
                f"tensor {name} has {num_dims} dimensions, expected 1 to {MAX_DIMS}"
            )
        dims = struct.unpack(f"<{num_dims}Q", self._take(8 * num_dims, name))
        kind, offset = self._number("<I", name), self._number("<Q", name)
        try:
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (KeyError, ValueError):
            raise _BadFileError(f"tensor {name} is of the unknown type {kind}") from None
        if not all(dims) or dims[0] % block:
            raise _BadFileError(
                f"tensor {name} of {shown(dims)} is not made of blocks of {block} of type "
                f"{gguf.GGMLQuantizationType(kind).name}"
            )
        num_bytes = math.prod(dims) // block * block_bytes
        return TensorInfo(name, tuple(reversed(dims)), kind, offset, num_bytes)

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(key, most=KEPT_TEXT)
        if kind in _SCALARS:
            value = self._number(_SCALARS[kind], key)
            if kind == _BOOL and value > 1:
                raise _BadFileError(f"key {key}: expected true or false, got a byte of {value}")
            return bool(value) if kind == _BOOL else value
        if kind != _ARRAY:
            raise _BadFileError(f"key {key} is of the unknown type {kind}")
        part = self._number("<I", key)
        if part in _SCALARS:
            width = struct.calcsize(_SCALARS[part])
            count = self._count(key, width)
            if count > KEPT_NUMBERS:
                self._at += count * width
                return None
            data = self._take(count * width, key)
            return list(struct.unpack(f"<{count}{_SCALARS[part][1]}", data))
        if part != _STRING:
            raise _BadFileError(f"key {key} is a list of the unknown type {part}")
        self._skip_strings(key)
        return None

    def _skip_strings(self, key: str) -> None:
        """A vocabulary has 150,000, of which no rank reads any: stepped over, but for texts that end."""
        count = self._count(key, 8)
        if count > MAX_STRINGS:
            raise _BadFileError(f"key {key} lists {count} texts, expected at most {MAX_STRINGS}")
        data, at, last = self._data, self._at, self._size - 8
        unpack = struct.Struct("<Q").unpack_from
        is_vocabulary = key == "tokenizer.ggml.tokens"
        lengths = {len(text) for text in END_TEXTS}
        found = []
        for number in range(count):
            if at > last:
                raise _BadFileError(f"it ends inside key {key}")
            (length,) = unpack(data, at)
            at += 8
            if is_vocabulary and length in lengths and data[at : at + length] in END_TEXTS:
                found.append(number)
            at += length
        if at > self._size:
            raise _BadFileError(f"it ends inside key {key}")
        self._at = at
        if is_vocabulary:
            self._end_tokens = tuple(found)

    def _count(self, what: str, each: int) -> int:
        count = self._number("<Q", what)
        if count > (self._size - self._at) // each:
            raise _BadFileError(
                f"{what}: {count} of at least {each} bytes are more than the file's {self._size} bytes"
            )
        return count

    def _string(self, what: str, *, most: int = MAX_KEY) -> str:
        length = self._count(what, 1)
        if length > most:
            raise _BadFileError(f"{what} is a text of {length} bytes, expected at most {most}")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise _BadFileError(f"{what} is no UTF-8 text") from None

    def _number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form), what))[0]

    def _take(self, count: int, what: str) -> bytes:
        end = self._at + count
        if end > self._size:
            raise _BadFileError(f"it ends inside {shown(what)}")
        taken = self._data[self._at : end]
        self._at = end
        return taken


def _placed(
    found: list[TensorInfo], begin: int, alignment: int, size: int
) -> tuple[TensorInfo, ...]:
    """The tensors at their places in the file: each aligned, inside, and beside the others."""
    names = set()
    placed = []
    for tensor in found:
        if tensor.name in names:
            raise _BadFileError(f"tensor {tensor.name} is there twice")
        names.add(tensor.name)
        if tensor.offset % alignment:
            raise _BadFileError(
                f"tensor {tensor.name} lies at {tensor.offset}, which is not aligned to {alignment}"
            )
        start = begin + tensor.offset
        if start + tensor.num_bytes > size:
            raise _BadFileError(f"it ends inside tensor {tensor.name}")
        placed.append(TensorInfo(tensor.name, tensor.shape, tensor.kind, start, tensor.num_bytes))
    ordered = sorted(placed, key=lambda tensor: tensor.offset)
    for one, other in itertools.pairwise(ordered):
        if one.offset + one.num_bytes > other.offset:
            raise _BadFileError(f"tensors {one.name} and {other.name} overlap")
    return tuple(placed)
