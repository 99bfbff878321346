"""Prompts and stop strings that are texts: which tokenizer reads them, and its ids."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pyparallel.models.dense import load_tokenizer

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1000
# Built once a model: of a GGUF it takes seconds.
_OF_MODEL: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def has_texts(prompts: Any) -> bool:
    """Whether ``prompts`` are texts and not ids.

    Raises:
        ValueError: one text alone, texts among ids, or messages of a chat.
    """
    if isinstance(prompts, str):
        raise ValueError(
            f"prompts: expected a list of lists of token ids or of texts, got str {prompts!r:.50}; "
            f"a list of one text is one prompt"
        )
    if not isinstance(prompts, (list, tuple)):
        return False
    for number, row in enumerate(prompts):
        if isinstance(row, Mapping) and {"role", "content"} <= set(row):
            raise ValueError(
                f"prompt {number}: expected a text or token ids, got a chat's message; give the ids of "
                f"tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)"
            )
    texts = [isinstance(row, str) for row in prompts]
    if any(texts) and not all(texts):
        number = texts.index(not texts[0])
        kind = type(prompts[number]).__name__
        expected = "a text" if texts[0] else "token ids"
        raise ValueError(f"prompt {number}: expected {expected} as prompt 0, got {kind}")
    return any(texts)


def tokenizer_for(model: nn.Module, given: Any) -> Any:
    """The tokenizer: as ``given``, in the folder or file ``given``, or where the model was loaded from.

    Raises:
        ValueError: none is given and the model was not loaded, or what is given is none.
        CheckpointError: none can be read from the path.
    """
    if given is None:
        path = getattr(model, "loaded_from", None)
        if path is None:
            raise ValueError(
                "tokenizer: expected one for prompts or stop strings that are texts, since the model "
                "was not loaded from a path; got None; give tokenizer="
            )
        if model not in _OF_MODEL:
            _OF_MODEL[model] = load_tokenizer(str(path))
        return _OF_MODEL[model]
    if isinstance(given, (str, Path)):
        return load_tokenizer(str(given))
    if not hasattr(given, "decode") or not (callable(given) or hasattr(given, "encode")):
        raise ValueError(
            f"tokenizer: expected a tokenizer of transformers or tokenizers, or a path, got "
            f"{type(given).__name__}"
        )
    return given


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """A text's ids, with the special tokens that the tokenizer puts around it."""
    found = tokenizer(text)["input_ids"] if callable(tokenizer) else tokenizer.encode(text)
    return list(getattr(found, "ids", found))


def checked_stops(stop_strings: str | Sequence[str]) -> tuple[str, ...]:
    """``stop_strings`` as a tuple.

    Raises:
        ValueError: one is empty or no text, or longer than :data:`MAX_STOP_CHARACTERS`; or there are
            more than :data:`MAX_STOPS`.
    """
    stops = (stop_strings,) if isinstance(stop_strings, str) else stop_strings
    if not isinstance(stops, (list, tuple)):
        raise ValueError(f"stop_strings: expected texts, got {type(stops).__name__}")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"stop_strings: expected texts that are not empty, got {stop!r:.50}")
        if len(stop) > MAX_STOP_CHARACTERS:
            raise ValueError(
                f"stop_strings: expected at most {MAX_STOP_CHARACTERS} characters, got {len(stop)}"
            )
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop_strings: expected at most {MAX_STOPS}, got {len(stops)}")
    return tuple(stops)
