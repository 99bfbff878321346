"""What layers keep for backward, measured, against the formulas of Korthikanti et al. 2022."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench.training.activation_memory import Layer, rank_rows
from pyparallel.comm.group import Group
from pyparallel.launch import launch
from pyparallel.layers.span import Span
from pyparallel.training.activation_memory import (
    LayerSizes,
    kept_for_backward,
    layer_bytes,
    paper_bytes,
)

SIZES = {"tokens": 96, "batch": 2, "hidden": 192, "heads": 12}


def kept_by_torch(
    sizes: LayerSizes, *, sequence_parallel: bool, recompute: str, paper: bool
) -> dict[str, int]:
    """Bytes that torch's kernels keep here beyond what the formulas say of their operations.

    The formulas are those of kernels that keep a norm's input and two numbers a row, a softmax's result,
    a dropout's mask of a byte an element, GELU's input, a matmul's two operands, and of attention q, k,
    v, the output and an fp32 number a query. What another processor's kernels keep besides, each called
    alone on the sizes of one rank, is nobody's choice but torch's, and is added to the formulas.
    """
    t, b, heads = sizes.ranks, sizes.batch, sizes.heads // sizes.ranks
    length = sizes.tokens // t if sequence_parallel else sizes.tokens

    def of(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)

    def beyond(run: Callable[..., Tensor], said: int, *inputs: Tensor) -> int:
        kept = kept_for_backward(lambda: run(*inputs), list(inputs))[1] - said
        # The formulas' own buffers must be there, or they are not those of these kernels.
        assert kept >= 0, (run, kept)
        return kept

    x, hidden = of(b, length, sizes.hidden), of(b, sizes.tokens, 4 * sizes.hidden // t)
    q, k, v = (of(b, heads, sizes.tokens, sizes.hidden // sizes.heads) for _ in range(3))
    scores = of(b, heads, sizes.tokens, sizes.tokens)
    norm, gain, shift = nn.functional.layer_norm, of(sizes.hidden), of(sizes.hidden)
    found = {
        "layer_norm": 2
        * beyond(lambda *a: norm(a[0], a[0].shape[-1:], *a[1:]), 4 * b * length, x, gain, shift),
        "gelu": beyond(nn.functional.gelu, 0, hidden),
    }
    masked = [(x, 2)] if paper else []
    if recompute == "none" and paper:
        masked.append((scores, 1))
        found["softmax"] = beyond(lambda s: s.softmax(-1), 2 * scores.numel(), scores)
        found["matmul"] = beyond(lambda a, b: a @ b.mT, 0, q, k) + beyond(
            lambda a, b: a @ b, 0, scores, v
        )
    elif recompute == "none":
        found["attention"] = beyond(
            lambda *a: nn.functional.scaled_dot_product_attention(*a, is_causal=True),
            2 * q.numel() + 4 * b * heads * sizes.tokens,
            q,
            k,
            v,
        )
    found["dropout"] = sum(
        count * beyond(lambda s: torch.native_dropout(s, 0.1, True)[0], s.numel(), s)
        for s, count in masked
    )
    return {} if recompute == "layers" else {name: n for name, n in found.items() if n}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_measured_as_in_the_formulas(ranks):
    sizes = LayerSizes(*SIZES.values(), ranks)
    for rows in launch(rank_rows, ranks, *SIZES.values(), threads=1):
        measured = {}
        for row in rows:
            mode = {name: row[name] for name in ("sequence_parallel", "recompute")}
            # Beyond the formulas: mean and deviation of the norms, a few bytes a token.
            for formula, found, paper in (
                ("paper_formula", "paper_measured", True),
                ("formula", "measured", False),
            ):
                beyond = kept_by_torch(sizes, **mode, paper=paper)
                expected = row[formula] + sum(beyond.values())
                assert expected <= row[found] * 1.001, (row, beyond)
                assert row[found] <= expected * 1.02, (row, beyond)
            measured[row["sequence_parallel"], row["recompute"]] = row["measured"]
        # Another mode's bytes would not pass.
        if ranks > 1:
            for recompute in ("none", "attention", "layers"):
                assert measured[True, recompute] < 0.95 * measured[False, recompute]
        for sequence_parallel in (False, True):
            assert measured[sequence_parallel, "layers"] < 0.3 * measured[sequence_parallel, "none"]


def test_what_another_kernel_keeps_is_told(monkeypatch):
    """A GELU that keeps one more buffer of its input's size: that, and nothing else, is added."""
    sizes = LayerSizes(8, 1, 24, 2)
    mode = {"sequence_parallel": True, "recompute": "none", "paper": True}
    assert kept_by_torch(sizes, **mode) == {}
    plain = nn.functional.gelu
    monkeypatch.setattr(nn.functional, "gelu", lambda x: plain(x * 1.5))
    assert kept_by_torch(sizes, **mode) == {"gelu": 2 * 8 * 4 * 24}


def test_the_papers_formulas():
    """Equations 1, 2, 4 and 6 and table 2, written out for GPT-3 175B's layer over 8 ranks."""
    s, b, h, a, t = 2048, 1, 12288, 96, 8
    sizes = LayerSizes(s, b, h, a, t)
    unit = s * b * h
    scores = 5 * a * s / h
    assert paper_bytes(LayerSizes(s, b, h, a), sequence_parallel=False) == unit * (34 + scores)
    assert paper_bytes(sizes, sequence_parallel=False) == unit * (10 + 24 / t + scores / t)
    assert paper_bytes(sizes, sequence_parallel=True) == unit * (34 / t + scores / t)
    selective = paper_bytes(sizes, sequence_parallel=True, recompute="attention")
    assert selective == unit * 34 / t
    assert paper_bytes(sizes, sequence_parallel=False, recompute="layers") == 2 * unit
    # Without scores and masks: 32 / t, and 4 bytes a query and head.
    own = layer_bytes(sizes, sequence_parallel=True)
    assert own == unit * 32 / t + 4 * s * b * a / t
    with pytest.raises(ValueError, match="recompute: expected one of"):
        layer_bytes(sizes, sequence_parallel=True, recompute="some")


def test_counts_shared_memory_once_and_parameters_not_at_all():
    linear = nn.Linear(4, 4)
    x = torch.ones(8, 4, requires_grad=True)
    base = torch.ones(8, 4)
    parameters = list(linear.parameters())
    assert kept_for_backward(lambda: linear(x), parameters)[1] == 8 * 4 * 4
    assert kept_for_backward(lambda: linear(x) + linear(x), parameters)[1] == 8 * 4 * 4
    # The sigmoid keeps its result, the product the constant.
    assert kept_for_backward(lambda: x.sigmoid() * base, parameters)[1] == 2 * 8 * 4 * 4


def test_agrees_with_what_the_allocator_holds():
    """A second measure, which knows nothing of autograd: bytes allocated and not given back."""
    sizes = LayerSizes(64, 2, 128, 8)
    layer = Layer(sizes, Group.single(), sequence_parallel=True, recompute="none", paper=True)
    layer.to(torch.bfloat16)
    x = torch.randn(2, 64, 128, dtype=torch.bfloat16, requires_grad=True)
    span = Span.of([0, 0], 64)
    parameters = list(layer.parameters())
    with torch.profiler.profile(profile_memory=True) as profile:
        y = layer(x, span)
    held = sum(event.self_cpu_memory_usage for event in profile.events())
    y, kept = kept_for_backward(lambda: layer(x, span), parameters)
    # The allocator holds the result too, and x was there before.
    held += x.untyped_storage().nbytes() - y.untyped_storage().nbytes()
    assert abs(held - kept) <= 0.03 * kept, (held, kept)
