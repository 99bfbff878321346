"""What lies beside a model's tensors: its config.json and its tokenizer."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyparallel.checkpoint.format import CheckpointError, read_json
from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.models.gguf_config import hugging_face_config

# Everything that tokenizers and generation read.
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
)


def write_files(folder: Path, model: nn.Module | None, source: Path | None) -> None:
    """Write config.json and the tokenizer's files into ``folder``, as far as they are known.

    Args:
        model: where it is transformers' its own configuration is written.
        source: the folder or GGUF file that has the rest.
    """
    if source is not None and source.suffix == ".gguf":
        _write_json(folder / "config.json", hugging_face_config(open_checkpoint(source).config()))
        _convert_tokenizer(source, folder)
    elif source is not None:
        beside = source if source.is_dir() else source.parent
        for pattern in ("config.json", *_COPIED):
            for file in beside.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
    if hasattr(getattr(model, "config", None), "save_pretrained"):
        _write_config(model, folder)


def set_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Make config.json say what the tensors are, in the spelling it has."""
    file = folder / "config.json"
    config = read_json(file)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    name = str(dtype).removeprefix("torch.")
    if config.get(key) != name:
        _write_json(file, {**config, key: name})


def source_of(source: str | Path | None, chain: list[nn.Module]) -> Path | None:
    """Where a model's files are: as given, or where the model (wrapped or not) was loaded from."""
    if source is not None:
        path = Path(source).absolute()
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        return path
    for module in chain:
        known = getattr(module, "loaded_from", None)
        known = known or getattr(getattr(module, "config", None), "name_or_path", None)
        if known and Path(known).exists():
            return Path(known).absolute()
    return None


def _write_config(model: nn.Module, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    # fully_shard puts its name before the class's.
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _convert_tokenizer(source: Path, folder: Path) -> None:
    """A GGUF's tokenizer as Hugging Face's files, where transformers can make them."""
    from pyparallel.models.dense import load_tokenizer

    try:
        load_tokenizer(str(source)).save_pretrained(folder)
    except ValueError:
        # Without transformers, or with a tokenizer it does not know, the model still is whole.
        return


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
