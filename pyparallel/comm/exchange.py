"""Values of every rank, told as JSON and tensors: nothing that a peer sends is unpickled."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# The name since torch 2.13, and the one before it.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# What one rank may tell at once; a length is a number from outside.
MAX_BYTES = 1 << 30
FIRST_BYTES = 1024
TENSOR = "tensor\0"


def encode(value: Any) -> bytes:
    """JSON with tensors in it as bytes; tuples become lists.

    Raises:
        TypeError: neither JSON nor a tensor is in it.
    """
    tensors: dict[str, Tensor] = {}

    def plain(item: Any) -> str:
        if not isinstance(item, Tensor):
            raise TypeError(f"expected JSON and tensors, got {type(item).__name__}")
        name = f"{TENSOR}{len(tensors)}"
        tensors[name] = item.detach().cpu().contiguous().clone()
        return name

    text = json.dumps(value, default=plain).encode()
    told = safetensors.torch.save(tensors) if tensors else b""
    return len(text).to_bytes(8, "little") + text + told


def decode(data: bytes) -> Any:
    """What :func:`encode` told."""
    end = 8 + int.from_bytes(data[:8], "little")
    tensors = safetensors.torch.load(data[end:]) if len(data) > end else {}

    def whole(item: Any) -> Any:
        if isinstance(item, list):
            return [whole(part) for part in item]
        if isinstance(item, dict):
            return {name: whole(part) for name, part in item.items()}
        return tensors.get(item, item) if isinstance(item, str) else item

    return whole(json.loads(data[8:end]))


def gather_objects(process_group: dist.ProcessGroup, value: T) -> list[T]:
    """``value`` of every rank, JSON and tensors; a call of all of them."""
    data, size = encode(value), process_group.size()
    # Most values fit into the first message, beside their length.
    head = len(data).to_bytes(8, "little") + data[: FIRST_BYTES - 8]
    heads = _rows(process_group, size, FIRST_BYTES, head)
    lengths = [int.from_bytes(row[:8], "little") for row in heads]
    if max(lengths) > MAX_BYTES:
        raise RuntimeError(f"a rank tells {max(lengths)} bytes, expected at most {MAX_BYTES}")
    rest = max(lengths) - (FIRST_BYTES - 8)
    tails = [b""] * size
    if rest > 0:
        tails = _rows(process_group, size, rest, data[FIRST_BYTES - 8 :])
    return [
        decode((head[8:] + tail)[:length])
        for head, tail, length in zip(heads, tails, lengths, strict=True)
    ]


def _rows(process_group: dist.ProcessGroup, size: int, length: int, own: bytes) -> list[bytes]:
    """``own`` of every rank, each filled up to ``length``."""
    device = _device(process_group)
    padded = torch.frombuffer(bytearray(own.ljust(length, b"\0")), dtype=torch.uint8).to(device)
    told = torch.empty(size * length, dtype=torch.uint8, device=device)
    _all_gather_single(told, padded, process_group)
    return [row.tobytes() for row in told.view(size, length).cpu().numpy()]


def _device(process_group: dist.ProcessGroup) -> torch.device:
    try:
        process_group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
