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
    return len(text).to_bytes(8, "little") + text + safetensors.torch.save(tensors)


def decode(data: bytes) -> Any:
    """What :func:`encode` told."""
    end = 8 + int.from_bytes(data[:8], "little")
    tensors = safetensors.torch.load(data[end:])

    def whole(item: Any) -> Any:
        if isinstance(item, list):
            return [whole(part) for part in item]
        if isinstance(item, dict):
            return {name: whole(part) for name, part in item.items()}
        return tensors.get(item, item) if isinstance(item, str) else item

    return whole(json.loads(data[8:end]))


def gather_objects(process_group: dist.ProcessGroup, value: T) -> list[T]:
    """``value`` of every rank, JSON and tensors; a call of all of them."""
    device = _device(process_group)
    own = torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8).to(device)
    size = process_group.size()
    lengths = torch.empty(size, dtype=torch.int64, device=device)
    _all_gather_single(lengths, torch.tensor([own.numel()], device=device), process_group)
    longest = int(lengths.max())
    if not 0 < int(lengths.min()) <= longest <= MAX_BYTES:
        raise RuntimeError(f"a rank tells {longest} bytes, expected at most {MAX_BYTES}")
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: own.numel()] = own
    told = torch.empty(size * longest, dtype=torch.uint8, device=device)
    _all_gather_single(told, padded, process_group)
    rows = told.view(size, longest).cpu()
    return [
        decode(row[:length].numpy().tobytes())
        for row, length in zip(rows, lengths.tolist(), strict=True)
    ]


def _device(process_group: dist.ProcessGroup) -> torch.device:
    try:
        process_group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
