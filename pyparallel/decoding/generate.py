"""Decode text: prefill once, then a token at a time, with a static KV cache on every rank.

Prompts of a batch may differ in length: they are padded on the right, every token keeps its true
position, and the padding's cache slots are overwritten by the tokens that are generated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Registers the sessions of CPU ranks and of pipelines.
from pyparallel import backend
from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.context import check_length
from pyparallel.comm.group import Group
from pyparallel.decoding import cpu_decoder, pipeline_session  # noqa: F401
from pyparallel.decoding.module_session import CausalLM, ModuleSession  # noqa: F401
from pyparallel.decoding.prompts import listed
from pyparallel.models.agreement import check_alike
from pyparallel.models.generation import GenerationDefaults
from pyparallel.ops.next_token import Sampling, whole_number
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
    prompts = listed(prompts)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
    sampling = sampling_of(model, sampling, max_new_tokens)
    if micro_batches is not None:
        micro_batches = whole_number("micro_batches", micro_batches)
    stops = {
        whole_number("stop_ids", token)
        for token in (model.stop_ids if stop_ids is None else stop_ids)
    }
    device = next(model.parameters()).device
    alike = [
        model.group,
        getattr(model, "context", None),
        getattr(model, "pipeline", None),
        replicas,
    ]
    check_alike(
        "prompts and options",
        (prompts, max_new_tokens, sampling, sorted(stops)),
        [group for group in alike if group is not None],
        device,
    )
    check_prompts(prompts, max_new_tokens, model.vocab_size, model.max_positions)
    _check_root(model)
    context = getattr(model, "context", None)
    if context is not None:
        check_length(max(map(len, prompts)), context)
    is_stage = getattr(model, "stage", None) is not None and model.stage.count > 1
    check_micro_batches(micro_batches, len(prompts) if is_stage else 1)
    if replicas is not None and replicas.size > 1:
        own = part_of(len(prompts), replicas)

        def tell(row: int, token: int) -> None:
            if on_token is not None:
                on_token(own.start + row, token)

        made = Generation([], 0.0, 0.0, 0)
        if own:
            made = generate(
                model,
                prompts[own.start : own.stop],
                max_new_tokens=max_new_tokens,
                sampling=replace(sampling, first_row=sampling.first_row + own.start),
                stop_ids=stop_ids,
                on_token=tell,
                micro_batches=None if micro_batches is None else min(micro_batches, len(own)),
            )
        device = next(model.parameters()).device
        return _joined(made, len(prompts), max_new_tokens, replicas, device)
    if len(prompts) > 1 and not is_stage and getattr(model, "rows_apart", False):
        return _one_by_one(model, prompts, max_new_tokens, sampling, stop_ids, on_token)
    started = time.perf_counter()
    if is_stage:
        session = backend.call("pipeline_session", model, prompts, max_new_tokens, micro_batches)
        tokens = session.run(sampling, stops, on_token)
        decode_s = time.perf_counter() - started - session.prefill_s
        return Generation(tokens, session.prefill_s, decode_s, session.steps)
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    session = backend.call("decode_session", model, prompts, max(lengths) + max_new_tokens)
    tokens: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)

    def draws(step: int) -> Tensor:
        # Prompt b's draw for its step-th token: a number that no other draw has.
        return torch.arange(len(prompts), device=device) * (1 << 32) + step

    def take(chosen: list[int]) -> None:
        for row, token in enumerate(chosen):
            if not finished[row]:
                tokens[row].append(token)
                finished[row] = token in stops or len(tokens[row]) == max_new_tokens
                if on_token is not None:
                    on_token(row, token)

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


def sampling_of(model: Any, sampling: Sampling | None, max_new_tokens: int) -> Sampling:
    """How tokens are chosen: as asked, and as the model's own defaults say where nothing is.

    Raises:
        ValueError: nothing is asked, and the defaults can't be followed.
    """
    defaults = getattr(model, "generation", None) or GenerationDefaults()
    if sampling is None:
        if defaults.refused is not None:
            raise ValueError(defaults.refused)
        sampling = defaults.sampling
    rules = defaults.rules if sampling.rules is None else sampling.rules
    if rules is None or not rules.active:
        return replace(sampling, rules=None)
    return replace(sampling, rules=replace(rules, max_new_tokens=max_new_tokens))


def _one_by_one(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int] | None,
    on_token: Callable[[int, int], None] | None,
) -> Generation:
    """Every prompt in a batch of its own: its answer must not depend on its neighbours' lengths."""
    tokens, prefill_s, decode_s, steps = [], 0.0, 0.0, 0
    for row, prompt in enumerate(prompts):

        def tell(_: int, token: int, row: int = row) -> None:
            if on_token is not None:
                on_token(row, token)

        made = generate(
            model,
            [prompt],
            max_new_tokens=max_new_tokens,
            sampling=replace(sampling, first_row=sampling.first_row + row),
            stop_ids=stop_ids,
            on_token=tell,
        )
        tokens += made.tokens
        prefill_s, decode_s = prefill_s + made.prefill_s, decode_s + made.decode_s
        steps += made.steps
    return Generation(tokens, prefill_s, decode_s, steps)


def _joined(
    made: Generation, rows: int, width: int, replicas: Group, device: torch.device
) -> Generation:
    """All replicas' tokens, in the order of the prompts, and the slowest one's times."""
    tokens = join_rows(made.tokens, rows, width, replicas, device)
    spent = torch.tensor([made.prefill_s, made.decode_s, made.steps], dtype=torch.float64)
    prefill_s, decode_s, steps = all_reduce_raw(spent.to(device), replicas, op="max").tolist()
    return Generation(tokens, prefill_s, decode_s, int(steps))


def _check_root(model: CausalLM) -> None:
    """Generation goes through the model's parts, so what runs around the whole would be left out."""
    for module in (model, getattr(model, "model", None)):
        if module is None:
            continue
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        added = [hook for hook in hooks if not hasattr(hook, "pyparallel_own")]
        if added or "forward" in vars(module):
            raise ValueError(
                f"model: expected a {type(module).__name__} without forward hooks or a forward of its "
                f"own, since generate() calls its parts; put them on a module inside it"
            )


def check_micro_batches(count: int | None, most: int) -> None:
    """Raise the ValueError of more micro-batches than ``most``: the prompts, or 1 without stages."""
    if count is not None and not 1 <= count <= most:
        why = "the prompts" if most > 1 else "one prompt, or a model that is not cut over pp"
        raise ValueError(f"micro_batches: expected 1 to {most} ({why}), got {count}")


def check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab_size: int, max_positions: int
) -> None:
    """Raise the ValueError that :func:`generate` documents, without a model."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not prompts:
        raise ValueError("prompts: expected at least one")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row}: expected at least one token, got none")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"prompt {row}: expected ids below the vocabulary's {vocab_size}, "
                f"got {max(prompt) if min(prompt) >= 0 else min(prompt)}; is the tokenizer the model's?"
            )
        if len(prompt) + max_new_tokens > max_positions:
            raise ValueError(
                f"prompt {row}: {len(prompt)} tokens and {max_new_tokens} new ones are more than "
                f"the context of {max_positions}"
            )
