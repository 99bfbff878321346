"""The angles of rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyparallel.reference import rope_frequencies


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched for contexts longer than the trained one.

    ``kind``: "default" (not at all), "linear" (all divided by ``factor``; Chen et al. 2023) or
    "llama3" (long wavelengths divided, short ones kept, smooth between; the Llama 3 report, 3.2).
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3"):
            raise ValueError(
                f"rope_type: expected 'default', 'linear' or 'llama3', got {self.kind!r}"
            )

    def apply(self, frequencies: Tensor) -> Tensor:
        """The stretched frequencies."""
        if self.kind == "default":
            return frequencies
        if self.kind == "linear":
            return frequencies / self.factor
        wavelengths = 2 * math.pi / frequencies
        turns = self.original_length / wavelengths
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clamp(0, 1)
        return (1 - keep) * frequencies / self.factor + keep * frequencies


class RotaryEmbedding(nn.Module):
    """Cosines and sines of ``position * frequency``, in fp32.

    Args:
        rotary_dim: how many features of a head are rotated (2E).
        theta: the base of the frequencies.
        scaling: how they are stretched.
        factors: what each frequency is divided by beyond that, where a checkpoint lists it.
    """

    def __init__(
        self,
        rotary_dim: int,
        theta: float = 10000.0,
        scaling: RopeScaling | None = None,
        factors: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        # A constant, not a buffer: `.to(bfloat16)` and the meta device must leave it alone.
        with torch.device("cpu"):
            frequencies = (scaling or RopeScaling()).apply(rope_frequencies(rotary_dim, theta))
            if factors is not None:
                frequencies = frequencies / torch.tensor(factors)
        self.frequencies = frequencies

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``positions [B, S]`` to cosines and sines [B, S, E]."""
        self.frequencies = self.frequencies.to(positions.device)
        angles = positions.unsqueeze(-1).float() * self.frequencies
        return angles.cos(), angles.sin()
