"""Decoding through the stages of a pipeline: several micro-batches of prompts in flight.

Prompts are cut into m micro-batches, each with a KV cache of its own on every stage. While stage s works
on one, stage s - 1 works on the next; the last stage chooses tokens and tells all others, and the first
one feeds them in again. A micro-batch goes on as soon as its own token is known, not when all have one,
so of m >= P micro-batches only the filling and the draining are lost, once for all tokens.

    bubble of one pass of all micro-batches     (P-1) / (m+P-1)

Legend: P stages, m micro-batches, B sequences of one, S the longest prompt of one, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyparallel.cut.shares import part_sizes
from pyparallel.decoding.generation import Step
from pyparallel.decoding.stage_link import StageLink
from pyparallel.models.decoder import Decoder
from pyparallel.ops.next_token import Sampling

# Given (row, its new tokens), as Request.take.
Take = Callable[[int, Sequence[int]], Step]


@dataclass
class _MicroBatch:
    """Some of the prompts, and what was made of them."""

    rows: range
    prompts: list[Sequence[int]]
    cache: Any
    tokens: list[list[int]] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    chosen: Tensor | None = None

    def __post_init__(self) -> None:
        self.tokens = [[] for _ in self.prompts]
        self.finished = [False] * len(self.prompts)

    @property
    def length(self) -> int:
        """S."""
        return max(len(prompt) for prompt in self.prompts)

    def starts(self, step: int) -> list[int]:
        """Where each sequence's token of a decoding step stands."""
        return [len(prompt) + step - 1 for prompt in self.prompts]

    def ids(self) -> Tensor:
        """The prompts [B, S], padded on the right."""
        ids = torch.zeros(len(self.prompts), self.length, dtype=torch.long)
        for row, prompt in zip(ids, self.prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        return ids


class PipelineSession:
    """What :func:`pyparallel.generate` drives where the model is a stage: all prompts, to their end.

    Args:
        model: this rank's stage.
        micro_batches: m; by default as many as stages, or prompts if they are fewer.

    Raises:
        ValueError: more micro-batches than prompts, or none.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        micro_batches: int | None,
    ) -> None:
        self.model = model
        self.link = StageLink(model)
        self.device = next(model.parameters()).device
        self.max_new_tokens = max_new_tokens
        count = micro_batches or min(len(prompts), model.stage.count)
        if model.rows_apart:
            count = len(prompts)
        self.parts: list[_MicroBatch] = []
        # Those whose last pass nobody has taken yet, the earliest first.
        self._flying: list[_MicroBatch] = []
        start = 0
        for size in part_sizes(len(prompts), count):
            rows = range(start, start + size)
            own = [prompts[row] for row in rows]
            slots = max(len(prompt) for prompt in own) + max_new_tokens
            self.parts.append(_MicroBatch(rows, own, model.new_cache(size, slots)))
            start += size
        self.prefill_s = 0.0
        self.steps = 0

    def run(self, sampling: Sampling, take: Take) -> Generator[Step, None, list[list[int]]]:
        """Each token as this stage learns it; then every prompt's new tokens, on every rank."""
        try:
            return (yield from self._run(sampling, take))
        except GeneratorExit:
            # Tokens that nobody has heard yet would be taken for those of the next prompts.
            if not self.model.stage.is_last:
                for part in self._flying:
                    self.link.hear(len(part.prompts))
            raise

    def _run(self, sampling: Sampling, take: Take) -> Generator[Step, None, list[list[int]]]:
        started = time.perf_counter()
        going = list(self.parts)
        for step in range(self.max_new_tokens + 1):
            for part in list(going):
                if step:
                    yield from self._take(part, take)
                if step == self.max_new_tokens or all(part.finished):
                    going.remove(part)
                    continue
                self._pass(part, step, sampling)
                self._flying.append(part)
            if step == 1:
                self.prefill_s = time.perf_counter() - started
            if not going:
                break
            self.steps = step
        return [tokens for part in self.parts for tokens in part.tokens]

    def _pass(self, part: _MicroBatch, step: int, sampling: Sampling) -> None:
        """One micro-batch through this stage: its prompts in step 0, then a token of each."""
        model, stage, batch = self.model, self.model.stage, len(part.prompts)
        if stage.is_first:
            x = part.chosen.unsqueeze(1) if step else part.ids().to(self.device)
        else:
            x = self.link.receive(batch, 1 if step else model.own_tokens(part.length))
        lengths = [len(prompt) for prompt in part.prompts]
        if not stage.is_last:
            starts = part.starts(step) if step else [0] * batch
            self.link.send(model.hidden(x, starts, part.cache, length=1 if step else part.length))
            return
        if step:
            hidden = model.hidden(x, part.starts(step), part.cache)[:, 0]
        else:
            hidden = model.last_hidden(x, lengths, part.cache)
        # Prompt b's draw for its step-th token: a number that no other draw has.
        draws = torch.arange(part.rows.start, part.rows.stop, device=self.device) * (1 << 32) + step
        texts = [[*prompt, *new] for prompt, new in zip(part.prompts, part.tokens, strict=True)]
        part.chosen = model.head.sample(hidden, sampling, draws, (texts, lengths))
        self.link.tell(part.chosen)

    def _take(self, part: _MicroBatch, take: Take) -> Generator[Step, None, None]:
        """Learn the tokens of a micro-batch's last pass."""
        self._flying.remove(part)
        if not self.model.stage.is_last:
            part.chosen = self.link.hear(len(part.prompts))
        for place, token in enumerate(part.chosen.tolist()):
            if not part.finished[place]:
                tokens = part.tokens[place]
                tokens.append(token)
                step = take(part.rows[place], tokens)
                part.finished[place] = step.last
                yield step


# The stages' ops are asked from the table one by one.
run_torch = run_reference = PipelineSession
