"""What a sharded checkpoint's index says of the optimizer, held against what `save` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pyparallel.checkpoint.schema import shown

# What stands in the JSON for a tensor that is cut as its parameter.
TENSOR = "tensor"


def check_optimizer(saved: Any) -> None:
    """Check the optimizer's counters and options.

    Raises:
        ValueError: they are not of the kinds that ``save`` writes.
    """
    if saved is None:
        return
    groups, state = _of(saved, "groups", list), _of(saved, "state", Mapping)
    for group in groups:
        names, options = _of(group, "names", list), _of(group, "options", Mapping)
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"optimizer: expected names of tensors, got {shown(names)}")
        for key, value in options.items():
            each = value if isinstance(value, list) else [value]
            if not all(_is_option(part) for part in each):
                raise ValueError(f"optimizer: {key}: expected numbers, got {shown(value)}")
    for name, values in state.items():
        if not isinstance(values, Mapping):
            raise ValueError(f"optimizer: {name}: expected an object, got {shown(values)}")
        for key, value in values.items():
            if isinstance(value, Mapping):
                kind = value.get("dtype")
                known = isinstance(kind, str) and isinstance(getattr(torch, kind, 0), torch.dtype)
                good = known and isinstance(value.get("value"), bool | int | float)
            else:
                good = value is None or value == TENSOR or isinstance(value, bool | int | float)
            if not good:
                raise ValueError(
                    f"optimizer: {key} of {name}: expected a number, got {shown(value)}"
                )


def _of(content: Any, key: str, kind: type) -> Any:
    value = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(value, kind):
        raise ValueError(f"optimizer: {key}: expected one, got {shown(value)}")
    return value


def _is_option(value: Any) -> bool:
    """A number that is one: no NaN. Words (a kind of schedule) are options too."""
    return (
        value is None
        or isinstance(value, str)
        or (isinstance(value, bool | int | float) and value == value)
    )
