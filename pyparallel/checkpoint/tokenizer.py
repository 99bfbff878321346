"""A tokenizer's files, checked before transformers opens them: regular, of a bounded size, JSON."""

from __future__ import annotations

from pathlib import Path

from pyparallel.checkpoint.format import CheckpointError, read_json, regular_file
from pyparallel.checkpoint.schema import Key, check_keys

# The largest vocabularies in use are below 40 MB.
MAX_BYTES = 256 << 20
# Read by transformers in Rust, or not JSON.
_WHOLE = (
    "tokenizer.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
)
_TOKENIZER_CONFIG = {
    "tokenizer_class": Key("str", null=True),
    "auto_map": Key("object", null=True),
    "model_max_length": Key("number", 0, 1e40, null=True),
    "added_tokens_decoder": Key("object", null=True),
    "padding_side": Key("str", null=True),
    "truncation_side": Key("str", null=True),
}
_JSON = {
    "tokenizer_config.json": _TOKENIZER_CONFIG,
    "special_tokens_map.json": {},
    "added_tokens.json": {},
    "vocab.json": {},
    "chat_template.json": {},
    "processor_config.json": {},
    "preprocessor_config.json": {},
    "config.json": {"model_type": Key("str", null=True)},
}


def check_tokenizer_files(path: Path) -> None:
    """Check what transformers may open to read the tokenizer of a folder, or of a GGUF file.

    Raises:
        CheckpointError: a file is a fifo, a device or the like, is too large, is no JSON where it
            should be, or has a key of another type.
    """
    if path.suffix == ".gguf":
        # transformers reads it with the gguf package, which trusts what a header says.
        from pyparallel.checkpoint.gguf_parts import read_parts

        read_parts(path)
        return
    folder = path if path.is_dir() else path.parent
    for name in _WHOLE:
        file = folder / name
        if file.exists():
            size = regular_file(file)
            if size > MAX_BYTES:
                raise CheckpointError(f"{file}: expected at most {MAX_BYTES} bytes, got {size}")
    for name, table in _JSON.items():
        file = folder / name
        if file.exists():
            try:
                check_keys(str(file), read_json(file), table)
            except CheckpointError:
                raise
            except ValueError as error:
                raise CheckpointError(str(error)) from None
