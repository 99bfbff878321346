"""What a rank would hold and send, counted on the modules that it would run.

One rank of each pipeline stage is built on the meta device, whose tensors have shapes and no storage,
and called: parameters and caches are counted to the byte, and collectives by an engine that notes them
(:mod:`pyparallel.comm.recorded`). So any size is counted on any machine. The rank is the first of tp and
cp, which holds the most.

Not counted: gradients' sums over dp, which move every parameter's gradient once, and what is exchanged
to choose a token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyparallel.comm.group import Group
from pyparallel.comm.recorded import RecordedCommunicator
from pyparallel.models.config import DecoderConfig
from pyparallel.models.context_decoder import ContextDecoder
from pyparallel.models.decoder import Decoder
from pyparallel.models.stage import Stage, stages_of
from pyparallel.ops.context import ring
from pyparallel.ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy

_RINGS = {
    torch.ops.pyparallel.ring_attention.default: ring.run,
    torch.ops.pyparallel.ring_attention_backward.default: ring.run_backward,
}
# Of each axis: how often a (collective, bytes) is called.
Calls = dict[str, Counter[tuple[str, int]]]


@dataclass(frozen=True)
class Counted:
    """One rank of a stage.

    Attributes:
        stage: which layers.
        weight_bytes: of the parameters; a tied one once.
        cache_bytes: of the KV cache of all its layers, for inference.
        calls: by phase, "prefill" and "token", or "forward" and "backward": the collectives.
    """

    stage: Stage
    weight_bytes: int
    cache_bytes: int = 0
    calls: dict[str, Calls] = field(default_factory=dict)


def dry_run_inference(
    config: DecoderConfig,
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    batch: int = 1,
    prompt: int,
    output: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Counted]:
    """A prompt and one token after it, of ``batch`` sequences: of each stage's first rank.

    Raises:
        ValueError: what :class:`Decoder` raises for more ranks than it can be cut into.
    """
    found = []
    for stage in stages_of(config, pp):
        model, groups = _build(config, stage, tp, pp, cp, dtype)
        calls = {}
        with torch.inference_mode(), _RingsRun():
            cache = model.new_cache(batch, prompt + output)
            for phase, start, length in (("prefill", 0, prompt), ("token", prompt, 1)):
                entered = model.own_tokens(length) if start == 0 else length
                x = _input(model, batch, length, entered, dtype)
                y = model.hidden(x, [start] * batch, cache, length=length)
                calls[phase] = _taken(groups, None if stage.is_last else y)
        held = sum(t.numel() * t.itemsize for c in cache for t in (c.keys, c.values))
        found.append(Counted(stage, _weight_bytes(model), cache_bytes=held, calls=calls))
    return found


def dry_run_training(
    config: DecoderConfig,
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    micro_batch: int = 1,
    sequence: int,
    dtype: torch.dtype = torch.bfloat16,
    sequence_parallel: bool = False,
    recompute: str = "none",
) -> list[Counted]:
    """One micro-batch forward and backward: of each stage's first rank.

    Raises:
        ValueError: as :func:`dry_run_inference`; another ``recompute``.
    """
    found = []
    for stage in stages_of(config, pp):
        options = {"sequence_parallel": sequence_parallel, "recompute": recompute}
        model, groups = _build(config, stage, tp, pp, cp, dtype, **options)
        x = _input(model, micro_batch, sequence, model.own_tokens(sequence), dtype)
        with _RingsRun():
            y = _forward(model, x, sequence)
            calls = {"forward": _taken(groups, None if stage.is_last else y)}
            y.backward(torch.empty_like(y))
        calls["backward"] = _taken(groups, None if stage.is_first else x.grad)
        found.append(Counted(stage, _weight_bytes(model), calls=calls))
    return found


class _RingsRun(TorchDispatchMode):
    """On tensors without storage an operator runs its fake kernel; a ring is run, for what it sends."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        return _RINGS.get(func, func)(*args, **(kwargs or {}))


def _build(
    config: DecoderConfig,
    stage: Stage,
    tp: int,
    pp: int,
    cp: int,
    dtype: torch.dtype,
    **options: bool | str,
) -> tuple[Decoder, dict[str, Group]]:
    groups = {
        axis: Group.over(RecordedCommunicator(axis, rank, size))
        for axis, rank, size in (("tp", 0, tp), ("cp", 0, cp), ("pp", stage.index, pp))
    }
    options |= {"group": groups["tp"], "stage": stage}
    if cp > 1:
        model = ContextDecoder(config, "meta", dtype, context=groups["cp"], **options)
    else:
        model = Decoder(config, "meta", dtype, **options)
    return model.eval(), groups


def _input(model: Decoder, batch: int, length: int, own: int, dtype: torch.dtype) -> Tensor:
    """What a stage is given: ids, or this rank's tokens of the stage's before."""
    if model.stage.is_first:
        return torch.empty(batch, length, dtype=torch.long, device="meta")
    shape = (batch, own, model.config.hidden_size)
    grad = not torch.is_inference_mode_enabled()
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _forward(model: Decoder, x: Tensor, length: int) -> Tensor:
    """A stage's output, or the last one's loss, with the head's logits never gathered."""
    if model.head is not None:
        model.head.gather_output = False
    y = model(x, length=length)
    if model.head is None:
        return y
    targets = torch.empty(y.shape[:-1], dtype=torch.long, device="meta")
    options = {"group": model.group, "vocab_size": model.vocab_size}
    return vocab_parallel_cross_entropy(y, targets, reduction="sum", **options)


def _taken(groups: dict[str, Group], message: Tensor | None) -> Calls:
    """What was called since the last time, and what the stage hands on."""
    calls: Calls = {}
    for axis, group in groups.items():
        calls[axis], group.communicator.calls = group.communicator.calls, Counter()
    if groups["pp"].size > 1 and message is not None:
        calls["pp"]["send", message.numel() * message.itemsize] += 1
    return {axis: found for axis, found in calls.items() if found}


def _weight_bytes(model: Decoder) -> int:
    return sum(p.numel() * p.itemsize for p in model.parameters())
