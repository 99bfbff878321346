"""Text from files, as rows of tokens of one length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Files are read until there are so many characters for each token that is wanted.
CHARACTERS_PER_TOKEN = 8


def token_rows(tokenizer: Any, path: Path, count: int, length: int) -> Tensor:
    """The first ``count`` rows of ``length`` tokens of a text, int64 [count, length].

    Args:
        path: a file, or a folder whose .py files, in the order of their names, are read one after
            another; those of its sub-folders are not.

    Raises:
        ValueError: nothing is there, or the text is too short.
    """
    if path.is_dir():
        files = sorted(path.glob("*.py"))
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"text: expected a file or a folder, got {path}, which does not exist")
    text = ""
    for file in files:
        text += file.read_text(encoding="utf-8", errors="replace")
        if len(text) >= count * length * CHARACTERS_PER_TOKEN:
            break
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][: count * length]
    if len(tokens) < count * length:
        raise ValueError(
            f"text: expected at least {count} rows of {length} tokens, got {len(tokens)} tokens in "
            f"{path}; ask for fewer or shorter sequences"
        )
    return torch.tensor(tokens).view(count, length)
