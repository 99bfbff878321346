"""Generation as an iterator: each token, and the text that it made certain."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pyparallel.decoding.decode_session import CausalLM
from pyparallel.decoding.request import Request, checked
from pyparallel.decoding.steps import steps_of
from pyparallel.ops.next_token import Sampling


class Piece(NamedTuple):
    """What one step gave one prompt.

    Attributes:
        row: the prompt's number.
        text: what is new and certain: "" while a character is not whole or may begin a stop string,
            and always without a tokenizer. Those of a prompt joined are its text.
        last: whether the prompt's text ends here.
    """

    row: int
    token: int
    text: str
    last: bool


def stream(
    model: CausalLM | nn.Module,
    prompts: Sequence[Sequence[int]] | Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    stop_strings: str | Sequence[str] = (),
    tokenizer: Any = None,
    micro_batches: int | None = None,
) -> Generator[Piece, None, None]:
    """What :func:`pyparallel.generate` makes of the same arguments, a :class:`Piece` a token.

    All ranks of the model go through it alike. Who leaves it early does so on all ranks after the same
    piece, or the others wait for it until their timeout.

    Raises:
        ValueError: as ``generate``; at the call, not at the first piece.
    """
    with torch.inference_mode():
        request = checked(
            model,
            prompts,
            max_new_tokens,
            sampling=sampling,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            replicas=None,
            micro_batches=micro_batches,
            streamed=True,
        )
    return _pieces(model, request)


@torch.inference_mode()
def _pieces(model: CausalLM, request: Request) -> Generator[Piece, None, None]:
    steps = steps_of(model, request)
    try:
        for row, token, last in steps:
            text = request.texts[row].fresh(last=last) if request.texts else ""
            yield Piece(row, token, text, last)
    finally:
        steps.close()
