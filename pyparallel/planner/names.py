"""Tables of named things: read from TOML, and looked up loosely; no such name gets the nearest."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pyparallel.checkpoint.format import regular_file
from pyparallel.checkpoint.schema import shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATA = Path(__file__).parent / "data"
# A file of one cluster; more is a mistake, and would only be parsed to be refused.
MAX_BYTES = 1 << 20
# What names of one model differ in.
_SUFFIXES = re.compile(r"[-_ ](instruct|chat|base|preview|it|hf|v0\.\d)$")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ValueError: it can't be read, is larger than 1 MiB, or is no TOML; the message names it.
    """
    try:
        if regular_file(path) > MAX_BYTES:
            raise ValueError(f"{path}: expected a TOML file of at most {MAX_BYTES} bytes")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"{path}: cannot be read ({reason})") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected TOML: {error}") from None


@cache
def shipped(name: str) -> Mapping[str, Mapping[str, Any]]:
    """The tables of one of the package's own data files: "models", "gpus", "links"."""
    return read_toml(DATA / f"{name}.toml")


def key_of(name: str) -> str:
    """What two spellings of one name have in common: no organisation, case, or punctuation.

    >>> key_of("meta-llama/Meta-Llama-3.1-8B-Instruct") == key_of("llama 3.1 8b")
    True
    """
    text = name.strip().lower().rpartition("/")[2]
    text = text.removeprefix("meta-").removeprefix("nvidia ")
    while (shorter := _SUFFIXES.sub("", text)) != text:
        text = shorter
    return re.sub(r"[^a-z0-9]", "", text)


def find(kind: str, name: str, known: Mapping[str, Mapping[str, Any]]) -> str:
    """The name in ``known`` that ``name`` means; an entry's ``aliases`` are names of it too.

    Raises:
        ValueError: there is none; the message gives the nearest ones.
    """
    keys = {key_of(each): each for each in known}
    for each, entry in known.items():
        for alias in entry.get("aliases", ()):
            keys.setdefault(key_of(alias), each)
    if (wanted := key_of(name)) in keys:
        return keys[wanted]
    near = difflib.get_close_matches(wanted, keys, n=3, cutoff=0.5)
    names = dict.fromkeys(keys[key] for key in near)
    ways = f"did you mean {' or '.join(names)}?" if names else f"known: {', '.join(known)}"
    raise ValueError(f"{kind}: no {kind} is called {shown(name)}; {ways}")
