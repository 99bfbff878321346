"""What the values of a checkpoint's files may be: a table of keys for each format, checked at the door.

A table says of each key what it is, in which range, and whether it may be null. Keys that a table does
not have are nobody's business here: nothing reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# No size of a model, count or position is larger: what is computed from two of them stays in 64 bits.
MAX_SIZE = 2**31 - 1
# Of a name or a choice.
MAX_TEXT = 256
# A model of models has three objects in one another.
MAX_DEPTH = 32
# A number that is in use today, and some orders of magnitude more.
MAX_THETA = 1e12


@dataclass(frozen=True)
class Key:
    """One key of a file.

    Attributes:
        kind: "int", "float" (no integer, as transformers), "number" (either), "bool", "str", "object";
            "ids" (an integer or a list of them); "ints", "numbers", "strs": lists.
        low, high: the range of numbers, ends included; of a list's, each.
        null: may be null.
    """

    kind: str
    low: float = 0
    high: float = MAX_SIZE
    null: bool = False

    def fault(self, value: Any) -> str | None:
        """What was expected, if ``value`` is something else."""
        if value is None:
            return None if self.null else self._expected()
        if self.kind == "ids" and not isinstance(value, list):
            return None if self._is("int", value) else self._expected()
        if self.kind in ("ids", "ints", "numbers", "strs"):
            whole = isinstance(value, list | tuple)
            part = {"ids": "int", "ints": "int", "numbers": "number", "strs": "str"}[self.kind]
            good = whole and all(self._is(part, each) for each in value)
        else:
            good = self._is(self.kind, value)
        return None if good else self._expected()

    def _is(self, kind: str, value: Any) -> bool:
        if kind in ("int", "float", "number"):
            types = {"int": int, "float": float, "number": int | float}[kind]
            return (
                isinstance(value, types)
                and not isinstance(value, bool)
                # False of NaN and of infinities too.
                and self.low <= value <= self.high
            )
        if kind == "str":
            return isinstance(value, str) and len(value) <= MAX_TEXT
        return isinstance(value, {"bool": bool, "object": Mapping}[kind])

    def _expected(self) -> str:
        names = {
            "int": "an integer",
            "float": "a number with a point",
            "number": "a number",
            "bool": "true or false",
            "str": f"a string of at most {MAX_TEXT} characters",
            "object": "an object",
            "ids": "an integer or a list of integers",
            "ints": "a list of integers",
            "numbers": "a list of numbers",
            "strs": "a list of strings",
        }
        text = names[self.kind]
        if self.kind in ("int", "float", "number", "ids", "ints", "numbers"):
            text += f" from {self.low:g} to {self.high:g}"
        return text + (" or null" if self.null else "")


SIZE = Key("int", 1)
BOOL = Key("bool")
TEXT = Key("str")
EPS = Key("float", 0, 1)
THETA = Key("number", 1e-6, MAX_THETA)
IDS = Key("ids", -1, MAX_SIZE, null=True)
ID = Key("int", -1, MAX_SIZE, null=True)

# What is read of a config.json of whatever model; those of the decoder's have more.
CONFIG = {
    "model_type": TEXT,
    "architectures": Key("strs", null=True),
    "dtype": Key("str", null=True),
    "torch_dtype": Key("str", null=True),
    "tie_word_embeddings": BOOL,
    "eos_token_id": IDS,
    "transformers_weights": Key("str", null=True),
    "quantization_config": Key("object", null=True),
}

# What transformers and generate() read of a generation_config.json.
GENERATION = {
    "eos_token_id": IDS,
    "bos_token_id": IDS,
    "pad_token_id": IDS,
    "do_sample": Key("bool", null=True),
    "temperature": Key("number", 0, 1e9, null=True),
    "top_k": Key("int", 0, null=True),
    "top_p": Key("number", 0, 1, null=True),
    "min_p": Key("number", 0, 1, null=True),
    "repetition_penalty": Key("number", 1e-6, 1e6, null=True),
    "max_length": Key("int", 0, null=True),
    "max_new_tokens": Key("int", 0, null=True),
    "min_length": Key("int", 0, null=True),
    "min_new_tokens": Key("int", 0, null=True),
    "no_repeat_ngram_size": Key("int", 0, null=True),
    "num_beams": Key("int", 1, null=True),
    "suppress_tokens": Key("ints", null=True),
    "begin_suppress_tokens": Key("ints", null=True),
}


def check_keys(where: str, content: Mapping[str, Any], table: Mapping[str, Key]) -> None:
    """Hold what a file says against its table.

    Args:
        where: names the file, or the part of one.

    Raises:
        ValueError: a key has another type or lies outside its range; the message names it.
    """
    for name, key in table.items():
        if name in content:
            expected = key.fault(content[name])
            if expected is not None:
                raise ValueError(
                    f"{where}: {name}: expected {expected}, got {shown(content[name])}"
                )


def check_numbers(where: str, content: Mapping[str, Any], *, depth: int = 0) -> None:
    """What holds for any model's config, however its keys are nested (but not for ever): no number is
    NaN, what is called an eps is from 0 to 1, and a theta above 0.

    Raises:
        ValueError: one is not; the message names it.
    """
    for name, value in content.items():
        if isinstance(value, Mapping):
            if depth == MAX_DEPTH:
                raise ValueError(f"{where}: expected at most {MAX_DEPTH} objects in one another")
            check_numbers(where, value, depth=depth + 1)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        key = None
        if str(name).endswith(("eps", "epsilon")):
            key = Key("number", 0, 1)
        elif str(name).endswith("theta"):
            key = THETA
        expected = key.fault(value) if key else "a number" if value != value else None
        if expected is not None:
            raise ValueError(f"{where}: {name}: expected {expected}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value from outside as a message may show it."""
    text = repr(value) if not isinstance(value, str) or len(value) < 200 else repr(value[:200])
    return text if len(text) <= 80 else text[:77] + "..."
