"""Decoding as a generator: every token as it comes, and what was made at the end.

All ranks of a model go through it alike. One that is closed before its end leaves no message behind, if
it is closed at the same token on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Generator

import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.group import Group
from pyparallel.decoding.decode_session import CausalLM
from pyparallel.decoding.generation import Generation, Step
from pyparallel.decoding.request import Request, is_stage
from pyparallel.training.batch import join_rows, part_of

Steps = Generator[Step, None, Generation]


def steps_of(model: CausalLM, request: Request, replicas: Group | None = None) -> Steps:
    """The tokens of a request, over ``replicas`` those of this rank's prompts."""
    if replicas is not None and replicas.size > 1:
        return _over_replicas(model, request, replicas)
    return _answer(model, request)


def _answer(model: CausalLM, request: Request) -> Steps:
    """All prompts of a request, on this model alone."""
    if is_stage(model):
        return _through_stages(model, request)
    if len(request.prompts) > 1 and getattr(model, "rows_apart", False):
        return _one_by_one(model, request)
    return _together(model, request)


def _over_replicas(model: CausalLM, request: Request, replicas: Group) -> Steps:
    """This replica's part of the prompts; then all replicas' tokens, and the slowest one's times."""
    own = part_of(len(request.prompts), replicas)
    made = Generation([], 0.0, 0.0, 0)
    if own:
        made = yield from _answer(model, request.part(own))
    device = next(model.parameters()).device
    width = request.max_new_tokens
    tokens = join_rows(made.tokens, len(request.prompts), width, replicas, device)
    spent = torch.tensor([made.prefill_s, made.decode_s, made.steps], dtype=torch.float64)
    prefill_s, decode_s, steps = all_reduce_raw(spent.to(device), replicas, op="max").tolist()
    return Generation(tokens, prefill_s, decode_s, int(steps))


def _through_stages(model: CausalLM, request: Request) -> Steps:
    """Several micro-batches at a time, from stage to stage."""
    started = time.perf_counter()
    asked = request.prompts, request.max_new_tokens, request.micro_batches
    session = backend.call("pipeline_session", model, *asked)
    tokens = yield from session.run(request.sampling, request.take)
    decode_s = time.perf_counter() - started - session.prefill_s
    return Generation(tokens, session.prefill_s, decode_s, session.steps)


def _one_by_one(model: CausalLM, request: Request) -> Steps:
    """Every prompt in a batch of its own: its answer must not depend on its neighbours' lengths."""
    made = []
    for row in range(len(request.prompts)):
        one = yield from _together(model, request.part(range(row, row + 1)))
        made.append(one)
    return Generation(
        [tokens for one in made for tokens in one.tokens],
        sum(one.prefill_s for one in made),
        sum(one.decode_s for one in made),
        sum(one.steps for one in made),
    )


def _together(model: CausalLM, request: Request) -> Steps:
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

    def take(chosen: list[int]) -> Generator[Step, None, None]:
        for row, token in enumerate(chosen):
            if not finished[row]:
                tokens[row].append(token)
                step = request.take(row, tokens[row])
                finished[row] = step.last
                yield step

    chosen = session.prefill(sampling, draws(0))
    yield from take(chosen)
    prefilled = time.perf_counter()
    steps = 0
    while not all(finished):
        steps += 1
        starts = [length + steps - 1 for length in lengths]
        chosen = session.step(chosen, starts, sampling, draws(steps))
        yield from take(chosen)
    return Generation(tokens, prefilled - started, time.perf_counter() - prefilled, steps)
