"""Rotary frequencies stretched for contexts longer than the trained one, beyond what RopeScaling knows.

Legend: E rotated pairs of features, D = 2 E, b the base, s the factor, L0 the trained length, n the
length of a call: one more than its largest position.

    yarn      f_i = (1 - k_i) / (s b^(2i/D)) + k_i / b^(2i/D), k falling from 1 to 0 between the pairs
              that turn beta_fast and beta_slow times in L0; cosines and sines times 0.1 log s + 1
    dynamic   b' = b (s n / L0 - (s - 1))^(D / (D - 2)) where n > L0
    longrope  f_i = 1 / (g_i b^(2i/D)), g the long factors where n > L0, else the short ones; cosines and
              sines times sqrt(1 + log s / log L0)

Sources: Peng et al. 2023, "YaRN"; bloc97 and emozilla 2023 (dynamic NTK); Ding et al. 2024, "LongRoPE".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyparallel.layers.rotary_embedding import RopeScaling, Stretch
from pyparallel.reference import rope_frequencies


@dataclass(frozen=True)
class YarnScaling:
    """Yarn; ``attention_factor`` is what cosines and sines are multiplied with."""

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    kind = "yarn"
    depends_on_length = False

    def frequencies(self, rotary_dim: int, theta: float, lengths: Tensor | None = None) -> Tensor:
        """[E], in fp32."""
        powers = theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)

        def pair_that_turns(times: float) -> float:
            turns = self.original_length / (times * 2 * math.pi)
            return rotary_dim * math.log(turns) / (2 * math.log(theta))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        if low == high:
            high += 0.001
        ramp = (torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)
        keep = 1 - ramp.clamp(0, 1)
        return (1.0 / (self.factor * powers)) * (1 - keep) + (1.0 / powers) * keep


@dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK: the base grows with the length of a call."""

    factor: float
    original_length: int

    kind = "dynamic"
    depends_on_length = True
    attention_factor = 1.0

    def frequencies(self, rotary_dim: int, theta: float, lengths: Tensor | None = None) -> Tensor:
        """[E], or [n, E] for the calls' ``lengths [n]``."""
        if lengths is None:
            return rope_frequencies(rotary_dim, theta)
        lengths = lengths.clamp(min=self.original_length)
        growth = self.factor * lengths / self.original_length - (self.factor - 1)
        base = theta * growth ** (rotary_dim / (rotary_dim - 2))
        exponents = torch.arange(0, rotary_dim, 2).float() / rotary_dim
        return 1.0 / base.unsqueeze(-1) ** exponents


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE: one list of divisors for short calls, another for long ones."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    attention_factor: float

    kind = "longrope"
    depends_on_length = True

    def frequencies(self, rotary_dim: int, theta: float, lengths: Tensor | None = None) -> Tensor:
        """[E], or [n, E] for the calls' ``lengths [n]``.

        Raises:
            ValueError: the lists don't have a divisor for each frequency.
        """
        for name in ("short_factors", "long_factors"):
            if len(getattr(self, name)) != rotary_dim // 2:
                raise ValueError(
                    f"rope {name.removesuffix('s')}: expected {rotary_dim // 2} numbers, one for each "
                    f"frequency, got {len(getattr(self, name))}"
                )
        powers = theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
        short, long = (
            1.0 / (torch.tensor(f) * powers) for f in (self.short_factors, self.long_factors)
        )
        if lengths is None:
            return short
        return torch.where(lengths.unsqueeze(-1) > self.original_length, long, short)


def scaling_of(given: Mapping[str, Any], config: Mapping[str, Any], max_positions: int) -> Stretch:
    """What a config's ``rope_parameters`` or ``rope_scaling`` says.

    Args:
        given: those parameters.
        config: the whole config, which may hold the trained length beside them.

    Raises:
        ValueError: an unknown kind, or a missing or impossible number.
    """
    kind = given.get("rope_type") or given.get("type") or "default"
    trained = config.get("original_max_position_embeddings")
    trained = trained or given.get("original_max_position_embeddings") or max_positions
    factor = given.get("factor")
    if kind == "dynamic":
        return DynamicScaling(_number("factor", factor), max_positions)
    if kind not in ("yarn", "longrope"):
        return RopeScaling(
            kind,
            1.0 if factor is None else factor,
            given.get("low_freq_factor", 1.0),
            given.get("high_freq_factor", 4.0),
            trained,
        )
    factor = max_positions / trained if factor is None else _number("factor", factor)
    attention = given.get("attention_factor")
    if kind == "yarn":
        scales = given.get("mscale"), given.get("mscale_all_dim")
        if attention is None and all(scales):
            attention = _yarn_scale(factor, scales[0]) / _yarn_scale(factor, scales[1])
        return YarnScaling(
            factor,
            trained,
            _yarn_scale(factor, 1.0) if attention is None else float(attention),
            given.get("beta_fast") or 32.0,
            given.get("beta_slow") or 1.0,
            given.get("truncate", True),
        )
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    lists = []
    for name in ("short_factor", "long_factor"):
        if not isinstance(given.get(name), (list, tuple)):
            raise ValueError(f"rope {name}: expected a list of numbers, got {given.get(name)!r}")
        lists.append(tuple(float(number) for number in given[name]))
    return LongRopeScaling(*lists, trained, float(attention))


def _yarn_scale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"rope {name}: expected a number above 0, got {value!r}")
    return float(value)
