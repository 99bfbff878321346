"""What :func:`pyparallel.generate` was asked for, checked: alike on all ranks, and possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyparallel.comm.context import check_length
from pyparallel.comm.group import Group
from pyparallel.decoding.decode_session import CausalLM
from pyparallel.decoding.generation import Step
from pyparallel.decoding.prompts import listed
from pyparallel.decoding.text_stream import TextStream
from pyparallel.decoding.texts import checked_stops, has_texts, ids_of, tokenizer_for
from pyparallel.models.agreement import check_alike
from pyparallel.models.generation import GenerationDefaults
from pyparallel.ops.next_token import Sampling, whole_number


@dataclass(frozen=True)
class Request:
    """Prompts, and how they are to be continued; the fields are the arguments of ``generate``.

    Attributes:
        first_row: the number of the first prompt in the caller's batch.
        tokenizer: None where nobody asked for texts.
        texts: of the caller's whole batch while they come; None where nobody looks at them.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling
    stops: frozenset[int]
    micro_batches: int | None = None
    first_row: int = 0
    stop_strings: tuple[str, ...] = ()
    tokenizer: Any = None
    texts: tuple[TextStream, ...] | None = None

    def part(self, rows: range) -> Request:
        """The consecutive prompts ``rows``: they draw the numbers that they would draw in the whole."""
        return replace(
            self,
            prompts=self.prompts[rows.start : rows.stop],
            sampling=replace(self.sampling, first_row=self.sampling.first_row + rows.start),
            micro_batches=self.micro_batches and min(self.micro_batches, len(rows)),
            first_row=self.first_row + rows.start,
        )

    def take(self, row: int, tokens: Sequence[int]) -> Step:
        """The last of ``tokens`` of prompt ``row`` of these, as it comes."""
        place, token = self.first_row + row, tokens[-1]
        said = self.texts is not None and self.texts[place].add(token)
        last = said or token in self.stops or len(tokens) == self.max_new_tokens
        return Step(place, token, last)


def checked(
    model: CausalLM,
    prompts: Sequence[Sequence[int]] | Sequence[str],
    max_new_tokens: int,
    *,
    sampling: Sampling | None,
    stop_ids: Sequence[int] | None,
    stop_strings: str | Sequence[str],
    tokenizer: Any,
    replicas: Group | None,
    micro_batches: int | None,
    streamed: bool = False,
) -> Request:
    """The request, or the ValueError that ``generate`` documents, on all ranks alike.

    Args:
        streamed: texts are looked at while they come.
    """
    stop_strings = checked_stops(stop_strings)
    are_texts = has_texts(prompts)
    if are_texts or stop_strings or tokenizer is not None:
        tokenizer = tokenizer_for(model, tokenizer)
    if are_texts:
        prompts = [ids_of(tokenizer, text) for text in prompts]
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
        (prompts, max_new_tokens, sampling, sorted(stops), stop_strings),
        [group for group in groups if group is not None],
        next(model.parameters()).device,
    )
    check_prompts(prompts, max_new_tokens, model.vocab_size, model.max_positions)
    _check_root(model)
    if context is not None:
        check_length(max(map(len, prompts)), context)
    check_micro_batches(micro_batches, len(prompts) if is_stage(model) else 1)
    texts = None
    if stop_strings or (streamed and tokenizer is not None):
        texts = tuple(TextStream(tokenizer, stop_strings) for _ in prompts)
    return Request(
        prompts,
        max_new_tokens,
        sampling,
        stops,
        micro_batches,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        texts=texts,
    )


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
