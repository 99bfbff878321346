"""What goes from stage to stage of a pipeline while text is generated: hidden states and tokens.

Sends return before their receiver has come, in every engine, so no order of them can deadlock. Every
wait is bounded, and a dead stage is an error of the communicator that names its rank.

Legend: B sequences, S_r tokens of this rank, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel.models.decoder import Decoder


class StageLink:
    """A stage's place in the pipeline.

    Raises:
        ValueError: the model does not know its neighbours.
    """

    def __init__(self, model: Decoder) -> None:
        if model.pipeline is None or model.pipeline.size != model.stage.count:
            raise ValueError(
                f"model: expected one stage on each rank of its pipeline, got {model.stage} with "
                f"{model.pipeline}; load it with load(path, mesh)"
            )
        self.stage = model.stage
        self._talk = model.pipeline.communicator
        self._last = model.stage.count - 1
        # A norm keeps the activations' dtype where matrices are int8.
        weight = model.layers[0].attention_norm.weight
        self._options = {"device": weight.device, "dtype": weight.dtype}
        self._hidden_size = model.config.hidden_size

    def receive(self, batch: int, tokens: int) -> Tensor:
        """Hidden states [B, S_r, H] of the stage before."""
        hidden = torch.empty(batch, tokens, self._hidden_size, **self._options)
        self._talk.recv(hidden, self.stage.index - 1)
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Hand hidden states to the next stage."""
        self._talk.send(hidden.contiguous(), self.stage.index + 1)

    def tell(self, chosen: Tensor) -> None:
        """From the last stage: its tokens [B] to all others, the first one first."""
        for stage in range(self._last):
            self._talk.send(chosen, stage, tag=1)

    def hear(self, batch: int) -> Tensor:
        """The last stage's tokens [B]."""
        chosen = torch.empty(batch, dtype=torch.long, device=self._options["device"])
        self._talk.recv(chosen, self._last, tag=1)
        return chosen

    def share(self, result: Tensor) -> None:
        """Fill ``result`` on every stage with the last one's."""
        self._talk.broadcast(result, self._last)
