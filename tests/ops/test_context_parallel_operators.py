"""Ring attention as a registered operator: opcheck, one compiled graph, and what its backward keeps."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.context import ContextShards
from pyparallel.comm.group import Group
from pyparallel.ops.context.attention import context_parallel_attention
from pyparallel.testing import assert_equal, normals, run_ranks

ALGORITHMS = ("ring", "ulysses")
PARTS = ("o", "dq", "dk", "dv")


def inputs(length: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of o, dense, with grouped heads; the same on every rank."""
    return [normals(2, length, count, 8, seed=seed) for seed, count in enumerate((4, 2, 2, 4))]


def operators(group: Group) -> None:
    length, operator = 7, torch.ops.pyparallel.ring_attention.default
    q, k, v, _ = inputs(length)
    for rows, window in (([], None), ([[0, 3, 7]], None), ([], 2)):
        shards = ContextShards.of(length, group, documents=rows or None)
        own = [shards.split(t).requires_grad_() for t in (q, k, v)]
        ranges = [end for held in shards.sharding.ranges for piece in held for end in piece]
        documents = [n for row in rows for n in (len(row), *row)]
        cut = (ranges, documents, group.handle, True, window, None)
        torch.library.opcheck(operator, (*own, *cut))


@pytest.mark.parametrize("ranks", [1, 2])
def test_opcheck(ranks: int) -> None:
    run_ranks(operators, ranks)


def compiled(group: Group) -> None:
    length = 12
    for algorithm, documents in itertools.product(ALGORITHMS, (None, [0, 5, 12])):
        shards = ContextShards.of(length, group, documents=documents, algorithm=algorithm)

        def attend(q, k, v, shards=shards):
            return context_parallel_attention(q * 2, k, v, shards, causal=True).sin()

        results = []
        for call in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
            *qkv, do = (shards.split(t) for t in inputs(length))
            qkv = [t.requires_grad_() for t in qkv]
            with count_collectives() as counter:
                o = call(*qkv)
                gradients = torch.autograd.grad(o, qkv, do)
            results.append((o.detach(), *gradients, dict(counter)))
        *eager, eager_counts = results[0]
        *graph, graph_counts = results[1]
        for part, one, two in zip(PARTS, eager, graph, strict=True):
            assert_equal(two, one, f"{algorithm} {part} compiled")
        assert graph_counts == eager_counts


def test_backward_keeps_its_group() -> None:
    q, k, v, do = inputs(5)
    q.requires_grad_()
    o = context_parallel_attention(q, k, v, ContextShards.of(5, Group.single()), causal=True)
    gc.collect()
    assert torch.autograd.grad(o, [q], do)[0].isfinite().all()


def test_compiled_in_one_graph() -> None:
    run_ranks(compiled, 2)
