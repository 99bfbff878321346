"""The prompts of ``pyparallel generate``: flags, files with one a line, standard input."""

from __future__ import annotations

import argparse
import sys
from typing import BinaryIO

from pyparallel.commands.flags import check_texts

# More than the largest context holds.
MAX_BYTES = 64 << 20


def asked_texts(args: argparse.Namespace) -> list[str]:
    """Every ``--prompt``, then those of ``--prompt-file``; without either, of standard input.

    With ``--chat`` standard input is for its questions, and there may be none.

    Raises:
        ValueError: there is none, a file can't be read, or a text is no UTF-8.
    """
    texts = list(args.prompt or ())
    check_texts("--prompt", texts)
    files = args.prompt_file or []
    for path in files:
        texts += _standard_input() if path == "-" else _of_file(path)
    if not texts and not files and not args.chat:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError(
                "--prompt: expected one, --prompt-file, text on standard input, or --chat to talk; got "
                "none"
            )
        texts = _standard_input()
    if not texts and (files or not args.chat):
        raise ValueError("--prompt-file: expected a prompt a line, got no line that is not blank")
    return texts


def _standard_input() -> list[str]:
    if sys.stdin is None:
        raise ValueError("standard input: expected a prompt a line, got a closed descriptor")
    return _lines("standard input", sys.stdin.buffer)


def _of_file(path: str) -> list[str]:
    try:
        # Not only regular ones: a shell's <(command) is a pipe.
        with open(path, "rb") as file:
            return _lines(path, file)
    except OSError as error:
        raise ValueError(
            f"--prompt-file: expected a file with a prompt a line, got {path}: {error.strerror}"
        ) from None


def _lines(name: str, file: BinaryIO) -> list[str]:
    """The lines that are not blank, without their ends."""
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name}: expected at most {MAX_BYTES} bytes of prompts, got more")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        given = data[error.start : error.start + 8]
        raise ValueError(f"{name}: expected text in UTF-8, got the bytes {given!r}") from None
    lines = (line.rstrip("\r") for line in text.split("\n"))
    return [line for line in lines if line.strip()]
