"""What changes logits before a token is chosen, by the tokens so far; on logits that are cut over ranks.

Every rule looks at single ids, so each rank applies it to its own columns and nothing is gathered. The
rules and their order are those of transformers' logits processors.

Legend: B rows, V_r this rank's vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitRules:
    """Penalties and bans, all off by default.

    Attributes:
        repetition_penalty: divides the positive logits of ids that came before, and
            multiplies negative ones.
        no_repeat_ngram_size: an id that would repeat so many tokens of the text is out.
        sequence_bias: ((ids), number): the last id gets the number where the others were just said.
        bad_words: sequences of ids of which the last is out where the others were just said.
        min_length, min_new_tokens: no stop before the text, or its new part, has so many tokens.
        forced_bos, forced_eos: the only id after a text of one token; the only ids at its end.
        decay: (start, factor): from so many new tokens on stops become likelier, exponentially.
        suppress, begin_suppress: ids that are out, everywhere or as the first new token.
        stops: the ids that end a text.
        max_new_tokens: how many come at the most.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos: int | None = None
    forced_eos: tuple[int, ...] = ()
    decay: tuple[int, float] | None = None
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()
    max_new_tokens: int = 0

    @property
    def active(self) -> bool:
        """Whether anything is changed."""
        return self != LogitRules(stops=self.stops, max_new_tokens=self.max_new_tokens)

    def apply(
        self,
        logits: Tensor,
        texts: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        *,
        start: int,
    ) -> Tensor:
        """The changed logits, another tensor.

        Args:
            logits: [B, V_r], the ids from ``start`` on.
            texts: each row's prompt and the tokens made so far.
            prompt_lengths: how many of them are the prompt's.
        """
        logits = logits.clone()
        for row, text, prompt in zip(logits, texts, prompt_lengths, strict=True):
            self._apply_to(row, list(text), prompt, start)
        return logits

    def _apply_to(self, row: Tensor, text: list[int], prompt: int, start: int) -> None:
        def here(ids: Sequence[int]) -> Tensor:
            """The columns of those ids that this rank has."""
            held = sorted({i - start for i in ids if 0 <= i - start < row.shape[0]})
            return torch.tensor(held, dtype=torch.long, device=row.device)

        def ban(ids: Sequence[int]) -> None:
            row[here(ids)] = -math.inf

        new = len(text) - prompt
        for ids, bias in self._biases(text):
            row[here(ids)] += bias
        if self.repetition_penalty != 1.0:
            said = here(text)
            scores, penalty = row[said], self.repetition_penalty
            row[said] = torch.where(scores < 0, scores * penalty, scores / penalty)
        size = self.no_repeat_ngram_size
        if 0 < size <= len(text):
            last = text[len(text) - size + 1 :]
            grams = (text[at : at + size] for at in range(len(text) - size + 1))
            ban([gram[-1] for gram in grams if gram[:-1] == last])
        ban([word[-1] for word in self.bad_words if _just_said(text, word) and word[-1:] != ()])
        if len(text) < self.min_length or new < self.min_new_tokens:
            ban(self.stops)
        forced: Sequence[int] = ()
        if self.forced_bos is not None and len(text) == 1:
            forced = (self.forced_bos,)
        if self.forced_eos and new == self.max_new_tokens - 1:
            forced = self.forced_eos
        if forced:
            row.fill_(-math.inf)
            row[here(forced)] = 0.0
        if self.decay is not None and new > self.decay[0]:
            stops = here(self.stops)
            growth = self.decay[1] ** (new - self.decay[0]) - 1
            row[stops] += row[stops].abs() * growth
        ban(self.suppress)
        if new == 0:
            ban(self.begin_suppress)

    def _biases(self, text: list[int]) -> list[tuple[tuple[int, ...], float]]:
        return [((ids[-1],), bias) for ids, bias in self.sequence_bias if _just_said(text, ids)]


def _just_said(text: list[int], word: Sequence[int]) -> bool:
    """Whether all of ``word`` but its last id ends ``text``."""
    before = list(word[:-1])
    return len(before) <= len(text) and text[len(text) - len(before) :] == before
