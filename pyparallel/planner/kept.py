"""Which parts of a quantized checkpoint stay at 16 bits.

``quantization_config`` of a config.json lists modules that are not quantized: by their names or parts of
them (``modules_to_not_convert``: transformers' own methods), or by names and expressions that begin with
"re:" (``ignore``: compressed-tensors).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

LISTS = ("modules_to_not_convert", "ignore")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def kept_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names that a config.json lists; none without quantization.

    Raises:
        ValueError: what should be a list of names is none.
    """
    quantization = config.get("quantization_config") or {}
    for key in LISTS if isinstance(quantization, Mapping) else ():
        names = quantization.get(key)
        if names is None:
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"quantization_config: {key}: expected a list of names, got {names!r:.60}"
            )
        return tuple(names)
    return ()


@lru_cache(maxsize=1 << 12)
def kept_parts(kept: tuple[str, ...], layer: int) -> tuple[bool, ...]:
    """Whether all matrices of the layer's attention, and of its MLP, are among ``kept``."""
    return tuple(
        all(_listed(kept, f"model.layers.{layer}.{part}.{name}") for name in names)
        for part, names in (("self_attn", ATTENTION), ("mlp", MLP))
    )


def _listed(kept: tuple[str, ...], name: str) -> bool:
    for entry in kept:
        if entry.startswith("re:"):
            try:
                if re.match(entry[3:], name):
                    return True
            except re.error as error:
                raise ValueError(
                    f"quantization_config: expected an expression after 're:', "
                    f"got {entry[3:]!r:.60}: {error}"
                ) from None
        elif f".{entry}." in f".{name}.":
            return True
    return False
