"""GGUF files, read by slices and dequantised by the gguf package.

llama.cpp stores the query and key rows of Llama models with each head's halves interleaved; they are
put back into Hugging Face's order here.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from pyparallel.checkpoint_format import Checkpoint, CheckpointError
from pyparallel.shard import REPLICATED, Range

# Bytes of one piece that is dequantised at a time; bounds the temporary fp32 copies.
PIECE_BYTES = 4 << 20


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
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.shapes,
        }
        if "rope_freqs.weight" in self.shapes:
            factors = self.read("rope_freqs.weight", REPLICATED, 0)
            found["rope_factors"] = tuple(factors.tolist())
        return {**self._metadata, **found}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def _copy(self, name: str, dim: int, start: int, out: Tensor) -> None:
        entry = self._entries[name]
        if out.dim() == 1:
            values = self._rows(entry, 0, 1, None)[0]
            values = _deinterleave(values, self._head_dim) if entry.interleaved else values
            out.copy_(values[start : start + out.shape[0]])
            return
        first_row, first_column = (start, 0) if dim == 0 else (0, start)
        columns = (first_column, first_column + out.shape[1])
        grain = self._head_dim if entry.interleaved else 1
        if first_row % grain or out.shape[0] % grain:
            raise CheckpointError(f"{self.path}: tensor {name} is only read by whole heads")
        step = max(grain, PIECE_BYTES // max(1, entry.row_bytes) // grain * grain)
        for row in range(0, out.shape[0], step):
            stop = min(out.shape[0], row + step)
            piece = self._rows(entry, first_row + row, first_row + stop, columns)
            piece = _deinterleave(piece, self._head_dim) if entry.interleaved else piece
            out[row:stop] = piece

    def _rows(self, entry: _Entry, start: int, stop: int, columns: Range | None) -> Tensor:
        """Rows in fp32; of the columns only the blocks that are asked for are dequantised."""
        kind = gguf.GGMLQuantizationType(entry.kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        data = np.fromfile(
            self.path,
            np.uint8,
            (stop - start) * entry.row_bytes,
            offset=entry.offset + start * entry.row_bytes,
        ).reshape(stop - start, entry.row_bytes)
        skip = 0
        if columns is not None:
            first, last = columns[0] // block, -(-columns[1] // block)
            data = np.ascontiguousarray(data[:, first * block_bytes : last * block_bytes])
            skip = first * block
        if kind == gguf.GGMLQuantizationType.F32:
            values = data.view(np.float32)
        elif kind == gguf.GGMLQuantizationType.F16:
            values = data.view(np.float16).astype(np.float32)
        else:
            values = gguf.quants.dequantize(data, kind)
        tensor = torch.from_numpy(values)
        return tensor if columns is None else tensor[:, columns[0] - skip : columns[1] - skip]

    @property
    def _head_dim(self) -> int:
        heads = self._metadata[f"{self._architecture}.attention.head_count"]
        width = self._metadata[f"{self._architecture}.embedding_length"]
        return self._metadata.get(f"{self._architecture}.attention.key_length", width // heads)


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
