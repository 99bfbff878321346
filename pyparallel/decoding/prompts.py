"""Prompts as whoever calls has them, as lists of ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyparallel.ops.next_token import whole_number


def listed(prompts: Any) -> list[list[int]]:
    """``prompts`` as lists of ints: a list of lists, tensors or arrays, or a tensor or array [B, S].

    Raises:
        ValueError: a text, one prompt alone, ids that are no whole numbers.
    """
    if isinstance(prompts, str | bytes | Mapping) or not hasattr(prompts, "__iter__"):
        raise ValueError(
            f"prompts: expected a list of lists of token ids, got {_kind(prompts)}; "
            f"a tokenizer makes ids of a text"
        )
    shape = getattr(prompts, "shape", None)
    if shape is not None and len(shape) != 2:
        raise ValueError(f"prompts: expected [batch, tokens], got shape {tuple(shape)}")
    rows = prompts.tolist() if shape is not None else list(prompts)
    return [_ids(number, row) for number, row in enumerate(rows)]


def _ids(number: int, row: Any) -> list[int]:
    what = f"prompt {number}"
    if isinstance(row, str | bytes):
        raise ValueError(
            f"{what}: expected token ids, got {_kind(row)}; a tokenizer makes ids of a text"
        )
    shape = getattr(row, "shape", None)
    if shape is not None:
        if len(shape) != 1:
            raise ValueError(f"{what}: expected [tokens], got shape {tuple(shape)}")
        row = row.tolist()
    if not isinstance(row, Sequence) and not hasattr(row, "__iter__"):
        raise ValueError(f"{what}: expected a list of token ids, got {_kind(row)}")
    return [whole_number(what, token) for token in row]


def _kind(value: Any) -> str:
    return f"{type(value).__name__}" + (f" {value!r}"[:60] if isinstance(value, str | int) else "")
