"""GGUF files mutated field by field: the fields are found by walking the header of a good file."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from tests.faults_mutations.values import FLOATS, INTEGERS, mutate_text

WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
FORMS = {6: "<f", 12: "<d"}


@dataclass(frozen=True)
class Field:
    """Bytes of a role: "count", "length", "text", "kind", "value", "dims", "type", "offset"."""

    role: str
    start: int
    width: int
    kind: int = 4


@dataclass(frozen=True)
class Layout:
    """The fields of a file; where its keys and tensors begin and end."""

    fields: tuple[Field, ...]
    keys: tuple[tuple[int, int], ...]
    tensors: tuple[tuple[int, int], ...]
    end: int


def layout_of(data: bytes) -> Layout:
    """Walk the header of a good file."""
    fields = [Field("magic", 0, 4), Field("version", 4, 4)]
    fields += [Field("count", 8, 8), Field("count", 16, 8)]
    num_tensors, num_keys = struct.unpack_from("<QQ", data, 8)
    at = 24

    def text() -> None:
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        fields.append(Field("length", at, 8))
        fields.append(Field("text", at + 8, length))
        at += 8 + length

    def number(role: str, width: int, kind: int = 4) -> int:
        nonlocal at
        fields.append(Field(role, at, width, kind))
        value = int.from_bytes(data[at : at + width], "little")
        at += width
        return value

    keys, tensors = [], []
    for _ in range(num_keys):
        start = at
        text()
        kind = number("kind", 4)
        if kind == 9:
            kind = number("kind", 4)
            for _ in range(number("count", 8)):
                if kind == 8:
                    text()
                else:
                    number("value", WIDTHS[kind], kind)
        elif kind == 8:
            text()
        else:
            number("value", WIDTHS[kind], kind)
        keys.append((start, at))
    for _ in range(num_tensors):
        start = at
        text()
        for _ in range(number("num dims", 4)):
            number("dims", 8)
        number("type", 4)
        number("offset", 8)
        tensors.append((start, at))
    return Layout(tuple(fields), tuple(keys), tuple(tensors), at)


def mutate_gguf(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A file with one field, key, tensor or byte changed."""
    layout = layout_of(data)
    kind = draw.choice(("field",) * 7 + ("key", "tensor", "data", "text"))
    if kind == "text":
        return mutate_text(data, draw)
    if kind == "data":
        at = draw.randrange(layout.end, len(data))
        return data[:at] + draw.randbytes(1) + data[at + 1 :], "data"
    if kind == "field":
        roles = sorted({field.role for field in layout.fields})
        role = draw.choice(roles)
        field = draw.choice([field for field in layout.fields if field.role == role])
        return _overwrite(data, field, draw), role
    # A whole key or tensor taken away or written twice, its count with it or not.
    spans, count_at = (layout.keys, 16) if kind == "key" else (layout.tensors, 8)
    start, end = draw.choice(spans)
    (count,) = struct.unpack_from("<Q", data, count_at)
    twice = draw.random() < 0.3
    count += (1 if twice else -1) if draw.random() < 0.8 else 0
    head = data[:count_at] + struct.pack("<Q", count) + data[count_at + 8 : layout.end]
    head = head[:end] + head[start:end] + head[end:] if twice else head[:start] + head[end:]
    head += b"\0" * (-len(head) % 32)
    body = data[-(-layout.end // 32) * 32 :]
    return head + body, f"{kind} {'twice' if twice else 'removed'}"


def _overwrite(data: bytes, field: Field, draw: random.Random) -> bytes:
    held = data[field.start : field.start + field.width]
    if field.role == "text" and held:
        at = draw.randrange(len(held))
        new = held[:at] + draw.choice((b"x", b"\xff", b"0", b"\0")) + held[at + 1 :]
    elif field.kind in FORMS and draw.random() < 0.9:
        new = _packed(FORMS[field.kind], draw.choice(FLOATS))
    else:
        value = int.from_bytes(held, "little")
        steps = (value + 1, value - 1, value * 2, value + 32, value - 32, value // 2, value ^ 32)
        if field.role in ("kind", "type"):
            steps += tuple(range(13))
        chosen = draw.choice(steps if draw.random() < 0.5 else INTEGERS)
        new = (chosen % (1 << (8 * field.width))).to_bytes(field.width, "little")
    return data[: field.start] + new + data[field.start + field.width :]


def _packed(form: str, value: float) -> bytes:
    try:
        return struct.pack(form, value)
    except OverflowError:
        return struct.pack(form, float("inf"))
