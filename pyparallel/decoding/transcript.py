"""What has been said so far, which penalties look at."""

from __future__ import annotations

from collections.abc import Sequence


class Transcript:
    """The texts of a batch while it grows.

    Attributes:
        said: each row's tokens, and how many of them are its prompt.
    """

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.said: tuple[list[list[int]], list[int]] = (
            [list(prompt) for prompt in prompts],
            [len(prompt) for prompt in prompts],
        )

    def add(self, tokens: Sequence[int]) -> None:
        """The token that each row got."""
        for text, token in zip(self.said[0], tokens, strict=True):
            text.append(token)

    def row(self, index: int) -> tuple[list[list[int]], list[int]]:
        """One row of it."""
        texts, lengths = self.said
        return [texts[index]], [lengths[index]]
