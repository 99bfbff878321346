"""Decoding through a model's modules, and what a model must have for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.decoding.transcript import Transcript
from pyparallel.ops.next_token import Said, Sampling, sample


class Head(Protocol):
    """What turns hidden states into tokens: :class:`pyparallel.layers.ParallelLMHead`."""

    def sample(
        self, x: Tensor, sampling: Sampling, draws: Tensor, said: Said | None = None
    ) -> Tensor: ...


class CausalLM(Protocol):
    """What :func:`generate` drives."""

    group: Group
    head: Head
    vocab_size: int
    max_positions: int
    stop_ids: tuple[int, ...]

    def new_cache(self, batch: int, length: int) -> Any: ...

    def hidden(self, ids: Tensor, starts: Sequence[int], cache: Any) -> Tensor: ...

    def last_hidden(self, ids: Tensor, lengths: Sequence[int], cache: Any) -> Tensor: ...


class ModuleSession:
    """Decoding through the modules: any model, any device.

    A session holds the sequences of one :func:`generate`; a backend may bring a faster one.
    """

    def __init__(self, model: CausalLM, prompts: Sequence[Sequence[int]], slots: int) -> None:
        self.model = model
        self.prompts = prompts
        self.said = Transcript(prompts)
        self.device = next(model.parameters()).device
        self.cache = model.new_cache(len(prompts), slots)

    def prefill(self, sampling: Sampling, draws: Tensor) -> list[int]:
        """The first new token of each prompt."""
        lengths = [len(prompt) for prompt in self.prompts]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, prompt in zip(ids, self.prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        hidden = self.model.last_hidden(ids.to(self.device), lengths, self.cache)
        return self._choose(hidden, sampling, draws)

    def step(
        self, tokens: Sequence[int], starts: Sequence[int], sampling: Sampling, draws: Tensor
    ) -> list[int]:
        """The token after each of ``tokens``, which stand at ``starts``."""
        self.said.add(tokens)
        ids = torch.tensor(tokens, device=self.device).unsqueeze(1)
        hidden = self.model.hidden(ids, starts, self.cache)
        return self._choose(hidden[:, 0], sampling, draws)

    def _choose(self, hidden: Tensor, sampling: Sampling, draws: Tensor) -> list[int]:
        head = self.model.head
        said = self.said.said
        if hasattr(head, "sample"):
            return head.sample(hidden, sampling, draws, said).tolist()
        # A head that its owner has put there makes whole logits, alike on all ranks.
        whole = {"start": 0, "group": Group.single(), "said": said}
        return sample(head(hidden), sampling, draws, **whole).tolist()


# Their ops are asked from the table one by one.
run_torch = run_reference = ModuleSession
