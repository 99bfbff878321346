"""What :func:`pyparallel.generate` was asked for, checked: alike on all ranks, and possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyparallel.comm.context import check_length
from pyparallel.comm.group import Group
from pyparallel.decoding.decode_session import CausalLM
from pyparallel.decoding.prompts import listed
from pyparallel.models.agreement import check_alike
from pyparallel.models.generation import GenerationDefaults
from pyparallel.ops.next_token import Sampling, whole_number

OnToken = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """Prompts, and how they are to be continued; the fields are the arguments of ``generate``.

    Attributes:
        first_row: the number of the first prompt in the caller's batch, which ``on_token`` is told.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling
    stops: frozenset[int]
    on_token: OnToken | None = None
    micro_batches: int | None = None
    first_row: int = 0

    def part(self, rows: range) -> Request:
        """The consecutive prompts ``rows``: they draw the numbers that they would draw in the whole."""
        return replace(
            self,
            prompts=self.prompts[rows.start : rows.stop],
            sampling=replace(self.sampling, first_row=self.sampling.first_row + rows.start),
            micro_batches=self.micro_batches and min(self.micro_batches, len(rows)),
            first_row=self.first_row + rows.start,
        )

    def tell(self, row: int, token: int) -> None:
        """Tell the caller of a token of prompt ``row`` of these."""
        if self.on_token is not None:
            self.on_token(self.first_row + row, token)


def checked(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None,
    stop_ids: Sequence[int] | None,
    on_token: OnToken | None,
    replicas: Group | None,
    micro_batches: int | None,
) -> Request:
    """The request, or the ValueError that ``generate`` documents, on all ranks alike."""
    prompts = listed(prompts)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
    sampling = sampling_of(model, sampling, max_new_tokens)
    if micro_batches is not None:
        micro_batches = whole_number("micro_batches", micro_batches)
    stops = frozenset(
        whole_number("stop_ids", token)
        for token in (model.stop_ids if stop_ids is None else stop_ids)
    )
    context = getattr(model, "context", None)
    groups = (model.group, context, getattr(model, "pipeline", None), replicas)
    check_alike(
        "prompts and options",
        (prompts, max_new_tokens, sampling, sorted(stops)),
        [group for group in groups if group is not None],
        next(model.parameters()).device,
    )
    check_prompts(prompts, max_new_tokens, model.vocab_size, model.max_positions)
    _check_root(model)
    if context is not None:
        check_length(max(map(len, prompts)), context)
    check_micro_batches(micro_batches, len(prompts) if is_stage(model) else 1)
    return Request(prompts, max_new_tokens, sampling, stops, on_token, micro_batches)


def is_stage(model: CausalLM) -> bool:
    """Whether the model is one of several stages of a pipeline."""
    stage = getattr(model, "stage", None)
    return stage is not None and stage.count > 1


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
