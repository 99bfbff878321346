"""GGUF files, read by slices and dequantised by the gguf package.

llama.cpp stores the query and key rows of Llama models with each head's halves interleaved; they are
put back into Hugging Face's order here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from pyparallel.checkpoint_format import Checkpoint, CheckpointError
from pyparallel.quantize import BLOCK, BLOCK_BYTES, block_row_bytes
from pyparallel.shard import REPLICATED, Range, Sharding

# Bytes of one piece that is dequantised at a time; bounds the temporary fp32 copies.
PIECE_BYTES = 4 << 20

# The kinds of blocks that can be held as they are stored.
BLOCK_KINDS = {gguf.GGMLQuantizationType[kind.upper()]: kind for kind in BLOCK_BYTES}


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: ``rows`` rows of ``row_bytes`` bytes from ``offset`` on."""

    offset: int
    rows: int
    row_bytes: int
    kind: int
    interleaved: bool


class _HeaderReader(gguf.GGUFReader):
    """The package's reader, which steps over the tokenizer's long lists of strings.

    It makes several array views a string: over a second for a vocabulary that no rank reads.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple:
        offs = int(orig_offs)
        is_array = raw_type == gguf.GGUFValueType.ARRAY and self.byte_order == "I"
        if not is_array or self._get(offs, np.uint32)[0] != gguf.GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        data = memoryview(self.data)
        (count,) = struct.unpack_from("=Q", data, offs + 4)
        offs += 12
        for _ in range(count):
            offs += 8 + struct.unpack_from("=Q", data, offs)[0]
        return offs - int(orig_offs), [], [], [gguf.GGUFValueType.ARRAY]


class GGUFCheckpoint(Checkpoint):
    """A .gguf file of a Llama-like model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = _HeaderReader(path)
        except Exception as error:
            # The package fails in many ways on a file that ends early.
            raise CheckpointError(f"{path}: not a whole GGUF file ({error})") from None
        self._metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types and field.types[0] != gguf.GGUFValueType.ARRAY
        }
        stop_ids = reader.fields.get("tokenizer.ggml.eos_token_ids")
        if stop_ids is not None:
            self._metadata["tokenizer.ggml.eos_token_id"] = stop_ids.contents()
        self._architecture = self._metadata.get("general.architecture")
        names = _hugging_face_names(self._architecture, self._metadata, path)
        self.shapes = {}
        self._entries: dict[str, _Entry] = {}
        size = path.stat().st_size
        for tensor in reader.tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            if tensor.data_offset + tensor.n_bytes > size:
                raise CheckpointError(f"{path}: ends inside tensor {tensor.name}")
            name = names.get(tensor.name, tensor.name)
            rows = shape[0] if len(shape) > 1 else 1
            interleaved = self._architecture == "llama" and name.endswith(
                ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
            )
            self.shapes[name] = shape
            self._entries[name] = _Entry(
                int(tensor.data_offset),
                rows,
                int(tensor.n_bytes) // rows,
                int(tensor.tensor_type),
                interleaved,
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
            factors = self.read("rope_freqs.weight", REPLICATED, 0)
            found["rope_factors"] = tuple(factors.tolist())
        return {**self._metadata, **found}

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
        if out.dim() == 1:
            values = _dequantized(self._stored(entry, 0, 1), entry)[0]
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
            piece = self._stored(entry, start, stop)[:, held]
            piece = _deinterleave(piece, self._head_dim) if entry.interleaved else piece
            yield slice(start - rows[0], stop - rows[0]), piece

    def _stored(self, entry: _Entry, start: int, stop: int) -> Tensor:
        """The bytes of whole rows."""
        offset = entry.offset + start * entry.row_bytes
        data = np.fromfile(self.path, np.uint8, (stop - start) * entry.row_bytes, offset=offset)
        return torch.from_numpy(data).view(stop - start, entry.row_bytes)

    @property
    def _head_dim(self) -> int:
        heads = self._metadata[f"{self._architecture}.attention.head_count"]
        width = self._metadata[f"{self._architecture}.embedding_length"]
        return self._metadata.get(f"{self._architecture}.attention.key_length", width // heads)


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


def _hugging_face_names(
    architecture: str | None, metadata: Mapping[str, Any], path: Path
) -> dict[str, str]:
    """GGUF's tensor names to Hugging Face's, for the parts that Llama-like decoders have."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = metadata.get(f"{architecture}.block_count")
    if architecture not in kinds or layers is None:
        raise CheckpointError(f"{path}: unknown GGUF architecture {architecture!r}")
    table = gguf.get_tensor_name_map(kinds[architecture], layers)
    parts = ["model.embed_tokens", "model.norm", "lm_head"]
    inside = ["input_layernorm", "post_attention_layernorm"]
    inside += [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    inside += [f"self_attn.{part}" for part in ("q_norm", "k_norm")]
    inside += [f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    parts += [f"model.layers.{layer}.{part}" for layer in range(layers) for part in inside]
    names = {}
    for part in parts:
        for suffix in (".weight", ".bias"):
            found = table.get_name(part + suffix, try_suffixes=(".weight", ".bias"))
            if found is not None:
                names[found] = part + suffix
    return names
