"""The angles of rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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

    depends_on_length = False
    attention_factor = 1.0

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

    def frequencies(self, rotary_dim: int, theta: float, lengths: Tensor | None = None) -> Tensor:
        """[E], in fp32."""
        return self.apply(rope_frequencies(rotary_dim, theta))


class Stretch(Protocol):
    """A way to stretch frequencies: :class:`RopeScaling`, or one of
    :mod:`pyparallel.layers.rope_scaling`.

    Attributes:
        kind: its name in a config.
        depends_on_length: the frequencies of a call depend on its length.
        attention_factor: what cosines and sines are multiplied with.
    """

    kind: str
    depends_on_length: bool
    attention_factor: float

    def frequencies(self, rotary_dim: int, theta: float, lengths: Tensor | None = None) -> Tensor:
        """[E]; where they depend on it, [n, E] for calls of ``lengths [n]``."""
        ...


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
        scaling: Stretch | None = None,
        factors: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        # A constant, not a buffer: `.to(bfloat16)` and the meta device must leave it alone.
        self.rotary_dim = rotary_dim
        self.theta = theta
        self.scaling = scaling or RopeScaling()
        with torch.device("cpu"):
            frequencies = self.scaling.frequencies(rotary_dim, theta)
            self.factors = None if factors is None else torch.tensor(factors)
            if self.factors is not None:
                frequencies = frequencies / self.factors
        self.frequencies = frequencies

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies of a call depend on how long it is."""
        return self.scaling.depends_on_length

    def forward(self, positions: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
        """``positions [B, S]`` to cosines and sines [B, S, E].

        Args:
            length: one more than the largest position of the whole call, of which these may be a part;
                by default of these.
        """
        self.frequencies = self.frequencies.to(positions.device)
        if not self.depends_on_length:
            return self._turned(positions, self.frequencies)
        if length is None:
            length = int(positions.max()) + 1 if positions.numel() else 1
        return self._turned(positions, self._stretched(torch.tensor([length])))

    def table(self, slots: int, prompt: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines [slots, E] of a sequence that grows by one token a call.

        Args:
            prompt: how many tokens its first call has.
        """
        positions = torch.arange(slots)
        if not self.depends_on_length:
            return self._turned(positions, self.frequencies.cpu())
        return self._turned(positions, self._stretched(positions.clamp(min=prompt - 1) + 1))

    def _stretched(self, lengths: Tensor) -> Tensor:
        with torch.device("cpu"):
            found = self.scaling.frequencies(self.rotary_dim, self.theta, lengths)
            found = found if self.factors is None else found / self.factors
        return found.to(self.frequencies.device)

    def _turned(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.unsqueeze(-1).float() * frequencies
        factor = self.scaling.attention_factor
        if factor == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * factor, angles.sin() * factor
