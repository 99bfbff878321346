"""GGUF files, read by slices and dequantised by the gguf package.

llama.cpp stores the query and key rows of Llama models with each head's halves interleaved; they are
put back into Hugging Face's order here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from pyparallel.checkpoint.format import Checkpoint, CheckpointError
from pyparallel.checkpoint.gguf_metadata import (
    check_metadata,
    hugging_face_names,
    scalars,
    stop_ids,
)
from pyparallel.checkpoint.gguf_parts import read_parts
from pyparallel.checkpoint.tensor_files import TensorFiles
from pyparallel.cut.quantize import BLOCK, BLOCK_BYTES, block_row_bytes
from pyparallel.cut.shard import REPLICATED, Range, Sharding

# Bytes of one piece that is dequantised at a time; bounds the temporary fp32 copies.
PIECE_BYTES = 4 << 20

# The kinds of blocks that can be held as they are stored.
BLOCK_KINDS = {gguf.GGMLQuantizationType[kind.upper()]: kind for kind in BLOCK_BYTES}


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: ``rows`` rows of ``row_bytes`` bytes from ``offset`` on."""

    file: Path
    offset: int
    rows: int
    row_bytes: int
    kind: int
    interleaved: bool


class GGUFCheckpoint(Checkpoint):
    """A .gguf file of a Llama-like model, or the first of the files that it is split into."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = TensorFiles()
        parts = read_parts(path)
        header = parts[0][1]
        self._metadata = scalars(header.metadata)
        self._end_tokens = header.end_tokens
        self._architecture = self._metadata.get("general.architecture")
        tensors = [(file, tensor) for file, part in parts for tensor in part.tensors]
        try:
            check_metadata(self._metadata, len(tensors))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        names = hugging_face_names(self._architecture, self._metadata, path)
        self.shapes = {}
        self._entries: dict[str, _Entry] = {}
        for file, tensor in tensors:
            name = names.get(tensor.name, tensor.name)
            if name in self.shapes:
                raise CheckpointError(f"{path}: tensor {tensor.name} is there twice, as {name}")
            rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
            interleaved = self._architecture == "llama" and name.endswith(
                ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
            )
            self.shapes[name] = tensor.shape
            self._entries[name] = _Entry(
                file, tensor.offset, rows, tensor.num_bytes // rows, tensor.kind, interleaved
            )

    def config(self) -> Mapping[str, Any]:
        """The metadata, and what only the tensors tell."""
        embedding = self.shapes.get("model.embed_tokens.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path}: tensor token_embd.weight is missing")
        found = {
            "vocab_size": embedding[0],
            "tied": "lm_head.weight" not in self.shapes,
            "attention_bias": "model.layers.0.self_attn.o_proj.bias" in self.shapes,
        }
        if "rope_freqs.weight" in self.shapes:
            factors = self.read("rope_freqs.weight", REPLICATED, 0).flatten()
            if not (torch.isfinite(factors) & (factors > 0)).all():
                raise CheckpointError(f"{self.path}: tensor rope_freqs.weight is not all positive")
            found["rope_factors"] = tuple(factors.tolist())
        return {**self._metadata, **found, "stop_ids": stop_ids(self._metadata, self._end_tokens)}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def block_kind(self, name: str, sharding: Sharding, rank: int) -> str | None:
        shape = self._shape(name, sharding)
        held = sharding.ranges[rank] if sharding.dim == 1 else ()
        whole = not any(edge % BLOCK for piece in held for edge in piece)
        return BLOCK_KINDS.get(self._entries[name].kind) if len(shape) == 2 and whole else None

    def read_blocks_into(self, out: Tensor, name: str, sharding: Sharding, rank: int) -> None:
        kind = self.block_kind(name, sharding, rank)
        if kind is None:
            return super().read_blocks_into(out, name, sharding, rank)
        rows, columns = self.shapes[name]
        wanted = out.shape[0], out.shape[1] // BLOCK_BYTES[kind] * BLOCK
        self._check_gives(wanted, name, sharding, rank)
        filled = 0
        for start, stop in ((0, rows),) if sharding.dim is None else sharding.ranges[rank]:
            if sharding.dim == 1:
                size = block_row_bytes(stop - start, kind)
                pieces = self._pieces(name, (0, rows), (start, stop))
            else:
                size = stop - start
                pieces = self._pieces(name, (start, stop), (0, columns))
            part = out.narrow(sharding.dim or 0, filled, size)
            for held, piece in pieces:
                part[held] = piece
            filled += size

    def _copy(self, name: str, dim: int, start: int, out: Tensor) -> None:
        entry = self._entries[name]
        if not _is_readable(entry.kind) or out.dim() > 2:
            raise CheckpointError(
                f"{self.path}: tensor {name} of shape {self.shapes[name]} is of type "
                f"{gguf.GGMLQuantizationType(entry.kind).name}, expected a vector or matrix of floats"
            )
        if out.dim() == 1:
            values = _dequantized(self._stored(entry, 0, 1, slice(0, entry.row_bytes)), entry)[0]
            values = _deinterleave(values, self._head_dim) if entry.interleaved else values
            out.copy_(values[start : start + out.shape[0]])
            return
        first_row, first_column = (start, 0) if dim == 0 else (0, start)
        rows = (first_row, first_row + out.shape[0])
        columns = (first_column, first_column + out.shape[1])
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(entry.kind)]
        skip = first_column % block
        for held, piece in self._pieces(name, rows, columns):
            out[held] = _dequantized(piece, entry)[:, skip : skip + out.shape[1]]

    def _pieces(self, name: str, rows: Range, columns: Range) -> Iterator[tuple[slice, Tensor]]:
        """A matrix's rows as they are stored, in Hugging Face's order, some at a time: their place
        among the rows, and of each the blocks that have the columns."""
        entry = self._entries[name]
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(entry.kind)]
        held = slice(columns[0] // block * block_bytes, -(-columns[1] // block) * block_bytes)
        grain = self._head_dim if entry.interleaved else 1
        if rows[0] % grain or rows[1] % grain:
            raise CheckpointError(f"{self.path}: tensor {name} is only read by whole heads")
        step = max(grain, PIECE_BYTES // max(1, entry.row_bytes) // grain * grain)
        for start in range(*rows, step):
            stop = min(rows[1], start + step)
            piece = self._stored(entry, start, stop, held)
            piece = _deinterleave(piece, self._head_dim) if entry.interleaved else piece
            yield slice(start - rows[0], stop - rows[0]), piece

    def _stored(self, entry: _Entry, start: int, stop: int, held: slice) -> Tensor:
        """Of rows the bytes that are wanted of each."""
        offset = entry.offset + start * entry.row_bytes
        wanted = held.stop - held.start
        return self._opened.rows_at(
            entry.file, offset, stop - start, entry.row_bytes, held.start, wanted
        )

    def close(self) -> None:
        self._opened.close()

    @property
    def _head_dim(self) -> int:
        get = self._metadata.get
        heads, width = (
            get(f"{self._architecture}.{key}")
            for key in ("attention.head_count", "embedding_length")
        )
        size = get(f"{self._architecture}.attention.key_length")
        size = width // heads if size is None and heads and width else size
        if not size or size % 2:
            raise CheckpointError(
                f"{self.path}: expected an even size of its heads, got {size}; its query and key rows "
                f"can't be put in order"
            )
        return size


@cache
def _is_readable(kind: int) -> bool:
    """Whether the gguf package can dequantise a type; it has integers too, which are no weights."""
    number = gguf.GGMLQuantizationType(kind)
    _, block_bytes = gguf.GGML_QUANT_SIZES[number]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), number)
    except (KeyError, NotImplementedError):
        return False
    return True


def _dequantized(rows: Tensor, entry: _Entry) -> Tensor:
    """Rows as they are stored, in fp32."""
    kind = gguf.GGMLQuantizationType(entry.kind)
    data = rows.contiguous().numpy()
    if kind == gguf.GGMLQuantizationType.F32:
        values = data.view(np.float32)
    elif kind == gguf.GGMLQuantizationType.F16:
        values = data.view(np.float16).astype(np.float32)
    else:
        values = gguf.quants.dequantize(data, kind)
    return torch.from_numpy(values)


def _deinterleave(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (0, D/2, 1, D/2 + 1, ...) of each head back into the order 0, 1, 2, ..."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
