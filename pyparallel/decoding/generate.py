"""Decode text: prefill once, then a token at a time, with a static KV cache on every rank.

Prompts of a batch may differ in length: they are padded on the right, every token keeps its true
position, and the padding's cache slots are overwritten by the tokens that are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pyparallel.comm.group_of import GroupLike, group_of
from pyparallel.decoding.decode_session import CausalLM
from pyparallel.decoding.generation import Generation
from pyparallel.decoding.request import checked
from pyparallel.decoding.steps import Steps, steps_of
from pyparallel.decoding.text_stream import cut_at, decoded
from pyparallel.ops.next_token import Sampling


@torch.inference_mode()
def generate(
    model: CausalLM | nn.Module,
    prompts: Sequence[Sequence[int]] | Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    stop_strings: str | Sequence[str] = (),
    tokenizer: Any = None,
    on_token: Callable[[int, int], None] | None = None,
    replicas: GroupLike | None = None,
    micro_batches: int | None = None,
) -> Generation:
    """Continue every prompt by up to ``max_new_tokens`` tokens; all ranks return the same.

    Args:
        model: from :func:`pyparallel.load`, on every rank.
        prompts: texts, or token ids as lists, tensors or arrays; lengths may differ.
        sampling: how tokens are chosen; by default as the model's generation_config.json says, and
            without one the likeliest. Its penalties hold unless ``sampling`` has rules of its own. The
            same seed gives the same tokens at every number of ranks.
        stop_ids: tokens that end a prompt's text; by default the model's.
        stop_strings: texts that end a prompt's text; its ``texts`` has what came before, its ``tokens``
            all up to the one that brought the stop string.
        tokenizer: reads prompts that are texts and writes ``texts``: of transformers or tokenizers, or
            the path of one. By default, where texts are given, that of the folder or file the model was
            loaded from (transformers' tokenizers; once a model).
        on_token: called with (prompt, token) as each comes, on every rank; over ``replicas``, with
            those of this rank's prompts.
        replicas: ``mesh.dp``: each replica of the model answers its part of the prompts, and tells the
            others. Parts may be uneven, or empty; a replica that has finished waits for the others as
            long as any collective does.
        micro_batches: into how many parts the prompts are cut that go through the stages of a
            pipeline, several at a time; by default as many as stages.

    Raises:
        ValueError: no prompt, an empty one, texts among ids, an id outside the vocabulary, or a prompt
            that with its new tokens is longer than the model's context; texts without a tokenizer; fewer
            tokens in the longest prompt than context-parallel ranks; more micro-batches than prompts, or
            some for a model that is no stage.
    """
    replicas = None if replicas is None else group_of(replicas, name="replicas")
    request = checked(
        model,
        prompts,
        max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        replicas=replicas,
        micro_batches=micro_batches,
    )
    made = _to_the_end(steps_of(model, request, replicas), on_token)
    if request.tokenizer is None:
        return made
    texts = [decoded(request.tokenizer, tokens) for tokens in made.tokens]
    return replace(made, texts=[cut_at(text, request.stop_strings) for text in texts])


def _to_the_end(steps: Steps, on_token: Callable[[int, int], None] | None) -> Generation:
    while True:
        try:
            row, token, _ = next(steps)
        except StopIteration as end:
            return end.value
        if on_token is not None:
            on_token(row, token)
