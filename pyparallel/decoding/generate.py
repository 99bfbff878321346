"""Decode text: prefill once, then a token at a time, with a static KV cache on every rank.

Prompts of a batch may differ in length: they are padded on the right, every token keeps its true
position, and the padding's cache slots are overwritten by the tokens that are generated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.group import Group
from pyparallel.decoding.decode_session import CausalLM
from pyparallel.decoding.request import Request, checked, is_stage
from pyparallel.ops.next_token import Sampling
from pyparallel.training.batch import join_rows, part_of


@dataclass(frozen=True)
class Generation:
    """What was generated and how long it took.

    Attributes:
        tokens: for each prompt the new tokens, with the stop token where one ended it.
        prefill_s: seconds from the call to the first token.
        decode_s: seconds for the tokens after the first.
        steps: decoding steps, each giving a token to every unfinished prompt.
    """

    tokens: list[list[int]]
    prefill_s: float
    decode_s: float
    steps: int

    @property
    def decode_tokens_per_s(self) -> float:
        """Steps a second: the speed one reader sees."""
        return self.steps / self.decode_s if self.decode_s else 0.0


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    replicas: Group | None = None,
    micro_batches: int | None = None,
) -> Generation:
    """Continue every prompt by up to ``max_new_tokens`` tokens; all ranks return the same.

    Args:
        model: from :func:`pyparallel.load`, on every rank.
        prompts: token ids, as lists, tensors or arrays; lengths may differ.
        sampling: how tokens are chosen; by default as the model's generation_config.json says, and
            without one the likeliest. Its penalties hold unless ``sampling`` has rules of its own. The
            same seed gives the same tokens at every number of ranks.
        stop_ids: tokens that end a prompt's text; by default the model's.
        on_token: called with (prompt, token) as each comes, on every rank; over ``replicas``, with
            those of this rank's prompts.
        replicas: ``mesh.dp``: each replica of the model answers its part of the prompts, and tells the
            others. Parts may be uneven, or empty; a replica that has finished waits for the others as
            long as any collective does.
        micro_batches: into how many parts the prompts are cut that go through the stages of a
            pipeline, several at a time; by default as many as stages.

    Raises:
        ValueError: no prompt, an empty one, an id outside the vocabulary, or a prompt that with
            its new tokens is longer than the model's context; fewer tokens in the longest prompt than
            context-parallel ranks; more micro-batches than prompts, or some
            for a model that is no stage.
    """
    request = checked(
        model,
        prompts,
        max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        on_token=on_token,
        replicas=replicas,
        micro_batches=micro_batches,
    )
    if replicas is not None and replicas.size > 1:
        return _over_replicas(model, request, replicas)
    return _answer(model, request)


def _answer(model: CausalLM, request: Request) -> Generation:
    """All prompts of a request, on this model alone."""
    if is_stage(model):
        return _through_stages(model, request)
    if len(request.prompts) > 1 and getattr(model, "rows_apart", False):
        return _one_by_one(model, request)
    return _together(model, request)


def _over_replicas(model: CausalLM, request: Request, replicas: Group) -> Generation:
    """This replica's part of the prompts; then all replicas' tokens, and the slowest one's times."""
    own = part_of(len(request.prompts), replicas)
    made = _answer(model, request.part(own)) if own else Generation([], 0.0, 0.0, 0)
    device = next(model.parameters()).device
    width = request.max_new_tokens
    tokens = join_rows(made.tokens, len(request.prompts), width, replicas, device)
    spent = torch.tensor([made.prefill_s, made.decode_s, made.steps], dtype=torch.float64)
    prefill_s, decode_s, steps = all_reduce_raw(spent.to(device), replicas, op="max").tolist()
    return Generation(tokens, prefill_s, decode_s, int(steps))


def _through_stages(model: CausalLM, request: Request) -> Generation:
    """Several micro-batches at a time, from stage to stage."""
    started = time.perf_counter()
    asked = request.prompts, request.max_new_tokens, request.micro_batches
    session = backend.call("pipeline_session", model, *asked)
    tokens = session.run(request.sampling, request.stops, request.tell)
    decode_s = time.perf_counter() - started - session.prefill_s
    return Generation(tokens, session.prefill_s, decode_s, session.steps)


def _one_by_one(model: CausalLM, request: Request) -> Generation:
    """Every prompt in a batch of its own: its answer must not depend on its neighbours' lengths."""
    rows = range(len(request.prompts))
    made = [_together(model, request.part(range(row, row + 1))) for row in rows]
    return Generation(
        [tokens for one in made for tokens in one.tokens],
        sum(one.prefill_s for one in made),
        sum(one.decode_s for one in made),
        sum(one.steps for one in made),
    )


def _together(model: CausalLM, request: Request) -> Generation:
    """A token of every prompt a step, until all have ended."""
    started = time.perf_counter()
    prompts, sampling = request.prompts, request.sampling
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    slots = max(lengths) + request.max_new_tokens
    session = backend.call("decode_session", model, prompts, slots)
    tokens: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)

    def draws(step: int) -> Tensor:
        # Prompt b's draw for its step-th token: a number that no other draw has.
        return torch.arange(len(prompts), device=device) * (1 << 32) + step

    def take(chosen: list[int]) -> None:
        for row, token in enumerate(chosen):
            if not finished[row]:
                tokens[row].append(token)
                finished[row] = token in request.stops or len(tokens[row]) == request.max_new_tokens
                request.tell(row, token)

    chosen = session.prefill(sampling, draws(0))
    take(chosen)
    prefilled = time.perf_counter()
    steps = 0
    while not all(finished):
        steps += 1
        starts = [length + steps - 1 for length in lengths]
        chosen = session.step(chosen, starts, sampling, draws(steps))
        take(chosen)
    return Generation(tokens, prefilled - started, time.perf_counter() - prefilled, steps)
