"""JSON that a person can read and compare: a list of numbers on one line."""

from __future__ import annotations

import json
from typing import Any


def compact_json(value: dict[str, Any]) -> str:
    """Text of objects within objects, a key a line, with a newline at its end."""
    return _text(value, "") + "\n"


def _text(value: Any, indent: str) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    inner = indent + " "
    lines = (f"{inner}{json.dumps(key)}: {_text(item, inner)}" for key, item in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
