"""What generation made, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Step(NamedTuple):
    """One token of one prompt.

    Attributes:
        row: the prompt's number in the caller's batch.
        last: whether it ends the prompt's text.
    """

    row: int
    token: int
    last: bool


@dataclass(frozen=True)
class Generation:
    """What was generated and how long it took.

    Attributes:
        tokens: for each prompt the new tokens, with the stop token where one ended it.
        prefill_s: seconds from the call to the first token.
        decode_s: seconds for the tokens after the first.
        steps: decoding steps, each giving a token to every unfinished prompt.
        texts: of ``tokens``, each up to the first stop string; None where no tokenizer was asked for.
    """

    tokens: list[list[int]]
    prefill_s: float
    decode_s: float
    steps: int
    texts: list[str] | None = None

    @property
    def decode_tokens_per_s(self) -> float:
        """Steps a second: the speed one reader sees."""
        return self.steps / self.decode_s if self.decode_s else 0.0

    @property
    def batch_tokens_per_s(self) -> float:
        """Tokens a second of all prompts together, without the first ones, which prefill gives."""
        count = sum(max(0, len(row) - 1) for row in self.tokens)
        return count / self.decode_s if self.decode_s else 0.0
