"""What layers keep for backward, measured, against the formulas of Korthikanti et al. 2022."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.activation_memory import Layer, rank_rows
from pyparallel.activation_memory import LayerSizes, kept_for_backward, layer_bytes, paper_bytes
from pyparallel.group import Group
from pyparallel.launch import launch
from pyparallel.layers.span import Span

SIZES = {"tokens": 96, "batch": 2, "hidden": 192, "heads": 12}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_measured_as_in_the_formulas(ranks):
    for rows in launch(rank_rows, ranks, *SIZES.values(), threads=1):
        measured = {}
        for row in rows:
            # Beyond the formulas: mean and deviation of the norms, a few bytes a token.
            for formula, found in (("paper_formula", "paper_measured"), ("formula", "measured")):
                assert row[formula] <= row[found] * 1.001, row
                assert row[found] <= row[formula] * 1.02, row
            measured[row["sequence_parallel"], row["recompute"]] = row["measured"]
        # Another mode's bytes would not pass.
        if ranks > 1:
            for recompute in ("none", "attention", "layers"):
                assert measured[True, recompute] < 0.95 * measured[False, recompute]
        for sequence_parallel in (False, True):
            assert measured[sequence_parallel, "layers"] < 0.3 * measured[sequence_parallel, "none"]


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
