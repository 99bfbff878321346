"""A prompt's new text while its tokens come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def cut_at(text: str, stop_strings: Sequence[str], start: int = 0) -> str:
    """``text`` before the first stop string that begins at ``start`` or later; all without one."""
    places = [place for stop in stop_strings if (place := text.find(stop, start)) >= 0]
    return text[: min(places)] if places else text


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of ``tokens``, without the special ones."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True)


class TextStream:
    """One prompt's text, a token at a time.

    A character may be spread over several tokens, and the text of a token may depend on the one before
    it; so what is decoded is a window: the tokens that gave the last text, and those since. A step costs
    the same however long the text is.

    Args:
        tokenizer: of transformers, or of the tokenizers library.
        stop_strings: what ends the text; it is no part of it.

    Attributes:
        text: what is whole so far.
        stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = tuple(stop_strings)
        self._tokens: list[int] = []
        # The window: its first token, and the first one whose text is not known yet.
        self._begin = self._unread = 0
        self._told = 0

    def add(self, token: int) -> bool:
        """Take the next token; returns :attr:`stopped`."""
        self._tokens.append(token)
        known = decoded(self._tokenizer, self._tokens[self._begin : self._unread])
        text = decoded(self._tokenizer, self._tokens[self._begin :])
        # A character that is not whole yet.
        if text.endswith("\ufffd"):
            return False
        if len(text) > len(known):
            self._begin = self._unread
            self._append(text[len(known) :])
        self._unread = len(self._tokens)
        return self.stopped

    def fresh(self, *, last: bool = False) -> str:
        """What was not told before: all at the last token, else what can begin no stop string."""
        if last and not self.stopped:
            whole = cut_at(decoded(self._tokenizer, self._tokens), self._stops)
            if whole.startswith(self.text[: self._told]):
                self.text = whole
        end = len(self.text) if last or self.stopped else len(self.text) - self._held()
        told, self._told = self._told, max(self._told, end)
        return self.text[told:end]

    def _append(self, text: str) -> None:
        longest = max(map(len, self._stops), default=1)
        start = max(0, len(self.text) - longest + 1)
        whole = self.text + text
        self.text = cut_at(whole, self._stops, start)
        self.stopped = len(self.text) < len(whole)

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max(
            (
                size
                for stop in self._stops
                for size in range(1, len(stop))
                if self.text.endswith(stop[:size])
            ),
            default=0,
        )
