"""Hostile values, and mutations of JSON and of bytes; everything is drawn from one generator."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

INTEGERS = (0, -1, 1, 2, 3, 5, 7, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63)
INTEGERS += (2**64 - 1, 10**30, -(2**31), -(2**63))
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-30, 1e30, 1e308, float("nan"), float("inf"), -float("inf"))
TEXTS = ("", ".", "..", "../x", "/dev/zero", "a\0b", "x" * 5000, "\u00e9\u4e2d", "true", "1", "nan")
TEXTS += ("float32", "int8", "linear", "yarn", "llama3", "gelu", "llama", "qwen2", "gpt2", "nn")
OTHERS = (None, True, False, [], {}, [[]], [None], {"a": 1}, [1, 2, 3], ["a"], [1.5])


def hostile(value: Any, draw: random.Random) -> Any:
    """Something in the place of a value: near it, at an edge, or of another type."""
    choice = draw.random()
    if choice < 0.35 and isinstance(value, int | float) and not isinstance(value, bool):
        near = [value + 1, value - 1, value * 2, -value, value / 2, float(value), str(value)]
        if isinstance(value, int):
            near.append(value // 2)
        return draw.choice(near)
    if choice < 0.5 and isinstance(value, str) and value:
        at = draw.randrange(len(value))
        return value[:at] + draw.choice(("", "x", "/", value)) + value[at + 1 :]
    if choice < 0.5 and isinstance(value, list) and value:
        return draw.choice((value[1:], value + value, value[::-1], [value], value[:1]))
    return copy.deepcopy(draw.choice(INTEGERS + FLOATS + TEXTS + OTHERS))


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) of a JSON document."""
    found: list[tuple[Any, Any]] = []
    stack = [content]
    while stack:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])
    return found


def mutate_json(content: Any, draw: random.Random) -> tuple[Any, str]:
    """A JSON document with one value, key or pair of values changed."""
    content = copy.deepcopy(content)
    found = places(content)
    # Long lists (a vocabulary, a table of merges) are one place, not most of them.
    few = [place for place in found if isinstance(place[0], dict)]
    holder, key = draw.choice(few if few and draw.random() < 0.8 else found)
    kind = draw.choice(("replace", "replace", "replace", "delete", "rename", "swap", "add"))
    if kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw.choice((str(key) + "x", str(key).upper(), ""))] = holder.pop(key)
    elif kind == "swap":
        other, place = draw.choice(found)
        holder[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(holder[key])
    elif kind == "add" and isinstance(holder, dict):
        holder[draw.choice(TEXTS)] = hostile(None, draw)
    else:
        kind = "replace"
        holder[key] = hostile(holder[key], draw)
    return content, f"{kind} {str(key)[:40]}"


def mutate_text(text: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes cut, flipped, doubled, nested or filled in."""
    at = draw.randrange(max(1, len(text)))
    kind = draw.choice(("cut", "flip", "double", "insert", "nest", "byte order", "empty"))
    if kind == "cut":
        return text[:at], kind
    if kind == "flip":
        return text[:at] + bytes([text[at] ^ (1 << draw.randrange(8))]) + text[at + 1 :], kind
    if kind == "double":
        return text + text, kind
    if kind == "insert":
        return text[:at] + draw.randbytes(draw.randint(1, 9)) + text[at:], kind
    if kind == "nest":
        return b"[" * 50000 + text, kind
    return (b"\xef\xbb\xbf" + text if kind == "byte order" else b""), kind


def mutate_json_file(text: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A JSON file, as a document or as bytes."""
    if draw.random() < 0.15:
        return mutate_text(text, draw)
    content, what = mutate_json(json.loads(text), draw)
    return json.dumps(content).encode(), what


def mutate_safetensors(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A safetensors file: its header as JSON, its length, the bytes behind it."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    kind = draw.choice(("header", "header", "header", "types", "places", "length", "data", "text"))
    if kind == "data" and rest:
        at = draw.randrange(len(rest))
        rest = rest[:at] + draw.randbytes(1) + rest[at + 1 :]
        return data[: 8 + size] + rest, "data"
    if kind == "length":
        wrong = draw.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1, len(data)))
        return wrong.to_bytes(8, "little") + data[8:], "length"
    if kind == "text":
        return mutate_text(data, draw)
    content = json.loads(header)
    what = kind
    names = [name for name in content if name != "__metadata__"]
    one, other = draw.choice(names), draw.choice(names)
    if kind == "types":
        content[one]["dtype"] = draw.choice(
            ("F32", "I32", "U32", "F16", "BF16", "I64", "F8_E4M3", "BOOL", "C64", "F4", "Q")
        )
        if draw.random() < 0.5:
            content[one]["shape"] = content[one]["shape"][::-1]
    elif kind == "places":
        key = draw.choice(("data_offsets", "shape", "dtype"))
        content[one][key], content[other][key] = content[other][key], content[one][key]
    else:
        content, what = mutate_json(content, draw)
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + rest, what
