"""``decode_session`` on the CPU: the whole decoder in C++, one call a token.

Prompts whose tokens are cut over ranks go through the modules, each rank's on its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyparallel.decoding.cpu_decoder import compiled
from pyparallel.decoding.cpu_decoder import reason_against as reason  # noqa: F401
from pyparallel.decoding.decode_session import ModuleSession
from pyparallel.decoding.transcript import Transcript
from pyparallel.models.context_decoder import ContextDecoder
from pyparallel.models.decoder import Decoder
from pyparallel.ops.next_token import Said, Sampling, sample


class CPUSession:
    """What :func:`pyparallel.generate` drives: prompts in, chosen tokens out."""

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]], slots: int) -> None:
        self.decoder = compiled(model)
        self.spread = None
        if isinstance(model, ContextDecoder):
            self.spread = ModuleSession(model, prompts, slots)
        else:
            self.decoder.start(len(prompts), slots, prompt=len(prompts[0]))
        self.sequences = self.decoder.sequences
        self.prompts = prompts
        self.said = Transcript(prompts)

    def prefill(self, sampling: Sampling, draws: Tensor) -> list[int]:
        """The first new token of each prompt."""
        if self.spread is not None:
            chosen = self.spread.prefill(sampling, draws)
            self.decoder.resume(self.spread.cache, prompt=max(map(len, self.prompts)))
            self.sequences = self.decoder.sequences
            return chosen
        self.decoder.use(self.sequences)
        chosen = []
        for row, prompt in enumerate(self.prompts):
            self.decoder.prefill(prompt, row=row)
            chosen += self._choose(sampling, draws[row : row + 1], self.said.row(row))
        return chosen

    def step(
        self, tokens: Sequence[int], starts: Sequence[int], sampling: Sampling, draws: Tensor
    ) -> list[int]:
        """The token after each of ``tokens``, which stand at ``starts``."""
        self.said.add(tokens)
        self.decoder.use(self.sequences)
        self.decoder.decode(tokens, rows=range(len(tokens)), positions=starts)
        return self._choose(sampling, draws, self.said.said)

    def _choose(self, sampling: Sampling, draws: Tensor, said: Said) -> list[int]:
        if sampling.is_greedy and sampling.rules is None:
            return self.decoder.greedy()
        decoder = self.decoder
        how = {"start": decoder.head_start, "group": decoder.group, "said": said}
        return sample(decoder.logits(), sampling, draws, **how).tolist()


run = CPUSession
