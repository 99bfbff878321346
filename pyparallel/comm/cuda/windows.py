"""Memory that NCCL knows: registered with a communicator once, used by all its calls.

NCCL sends from registered memory, and receives into it, without staging copies, and its collectives of
symmetric windows need fewer multiprocessors. Where the library or the machine cannot register memory,
callers take ordinary memory, and nothing else changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyparallel.native.cuda import extension as cuda_extension

# What NCCL allocates in.
GRANULE = 2 << 20


class Windows:
    """The registered memory of one communicator, by name; grows, never shrinks before `close`."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.memories: dict[str, Tensor] = {}
        self.windows: list[int] = []
        self.refused = False

    def memory(self, name: str, num_bytes: int) -> Tensor | None:
        """At least `num_bytes` bytes (uint8) under that name; None where they cannot be registered.

        A call of all ranks with the same arguments. More than before makes a new window; the old one
        stays, since captured graphs use it, and is at most as large as half of the new one.
        """
        found = self.memories.get(name)
        if found is not None and found.numel() >= num_bytes:
            return found
        # Registering synchronises, which a capture does not allow.
        if self.refused or torch.cuda.is_current_stream_capturing():
            return None
        held = 0 if found is None else found.numel()
        size = -(-max(num_bytes, 2 * held, 1) // GRANULE) * GRANULE
        window, address = self.engine.allocate_window(size)
        if window == 0:
            self.refused = True
            return None
        self.windows.append(window)
        self.memories[name] = cuda_extension.tensor_at(address, size)
        return self.memories[name]

    def close(self) -> None:
        """Deregisters and frees all; nobody may use the memory afterwards."""
        self.memories.clear()
        while self.windows:
            self.engine.free_window(self.windows.pop())
