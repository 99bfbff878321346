"""The numbers and texts of the commands' flags, checked before anything is read or started for them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from pyparallel.cut.shares import check_shares
from pyparallel.limits import (
    MAX_RANKS,
    check_count,
    check_ranks,
    check_real,
    check_threads,
    check_timeout,
    max_threads,
)

# Those of pyparallel.mesh, which imports torch; a help has no time for that.
AXES = ("dp", "pp", "cp", "tp")
# Indices are 32 bits in more than one kernel.
MAX_LENGTH = 2**31 - 1
# Smallest and largest; None is a flag that was not given.
INTEGERS = {
    "steps": (1, 10**9),
    "batch": (1, 2**20),
    "length": (1, MAX_LENGTH),
    "sequences": (1, MAX_LENGTH),
    "chunks": (1, 2**10),
    "accumulate": (1, 2**20),
    "warmup": (0, 10**9),
    "save_every": (1, 10**9),
    "eval_every": (1, 10**9),
    "eval_sequences": (1, MAX_LENGTH),
    "top_k": (None, MAX_LENGTH),
    "seed": (-(2**63), 2**63 - 1),
    "max_new_tokens": (None, MAX_LENGTH),
}


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """``--timeout`` of a command that starts ranks."""
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds that a rank may wait for another, or be stopped (default 300)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """``-m`` and ``--tokenizer``: what is read."""
    parser.add_argument(
        *("-m", "--model"),
        required=True,
        metavar="PATH",
        help="a folder of safetensors, or a GGUF file",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="where the tokenizer is, if not with the model"
    )


def add_shares(parser: argparse.ArgumentParser) -> None:
    """``--shares`` of a command that cuts a model over tp."""
    parser.add_argument(
        "--shares",
        type=_whole_numbers,
        metavar="S,S,...",
        help="each --tp rank's part of every matrix, in whole numbers: 2,1,1 where the first device is "
        "twice as large or fast as the others; default: equal",
    )


def _whole_numbers(text: str) -> tuple[int, ...]:
    """Of ``2,1,1``; what they may be is checked with the other numbers."""
    words = [word.strip() for word in text[:10_000].split(",")]
    # Not int()'s business: it reads any number of digits, underlines, and digits of any script.
    if not all(w.isascii() and w.removeprefix("-").isdigit() and len(w) < 20 for w in words):
        raise argparse.ArgumentTypeError(
            f"expected whole numbers with commas between, such as 2,1,1; got {text[:60]!r}"
        )
    return tuple(map(int, words))


def check_numbers(args: argparse.Namespace, axes: Sequence[str] = ()) -> None:
    """Raise the ValueError of the first flag whose number can't be served, by its name.

    Args:
        axes: flags of ranks, whose product is started.
    """
    for axis in axes:
        check_ranks(f"--{axis}", getattr(args, axis))
    world_size = math.prod(getattr(args, axis) for axis in axes)
    if world_size > MAX_RANKS:
        asked = " x ".join(f"--{axis} {getattr(args, axis)}" for axis in axes)
        raise ValueError(
            f"{asked} = {world_size} ranks: expected at most {MAX_RANKS}, what one machine's shared "
            f"memory serves"
        )
    if getattr(args, "shares", None) is not None:
        check_shares("--shares", args.shares, args.tp)
    for name, (least, most) in INTEGERS.items():
        value = getattr(args, name, None)
        if value is not None:
            check_count(_flag(name), value, most, least=-(2**63) if least is None else least)
    if getattr(args, "threads", None) is not None:
        check_threads("--threads", args.threads, world_size)
    if getattr(args, "jobs", None) is not None:
        check_count("--jobs", args.jobs, max_threads(), why=" processes on this machine")
    if hasattr(args, "timeout"):
        check_timeout("--timeout", args.timeout)
    for name, least in (("temperature", -math.inf), ("top_p", -math.inf), ("lr", 0.0)):
        if getattr(args, name, None) is not None:
            check_real(_flag(name), getattr(args, name), least=least)
    if hasattr(args, "max_norm") and not args.max_norm > 0:
        raise ValueError(f"--max-norm: expected more than 0, or inf, got {args.max_norm}")


def check_texts(flag: str, texts: Sequence[str]) -> None:
    """Raise the ValueError of an argument that was no UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            given = text.encode(errors="surrogateescape")[:40]
            raise ValueError(f"{flag}: expected text in UTF-8, got the bytes {given!r}") from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
