"""Embedding and head with the sequence cut over the ranks, against dense ones; exact, on integers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.comm.sequence import sequence_sizes
from pyparallel.cut.shard import part_sizes
from pyparallel.layers import ParallelLMHead, VocabParallelEmbedding
from pyparallel.testing import assert_equal, integers, own, run_ranks
from tests.layers.counts import counted, expected_counts

RANKS = [1, 2, 3, 4]


def vocabulary(group: Group) -> None:
    """Embedding and head, tied; ids on every edge of the shards."""
    for vocab, s in ((13, 6), (3, 5), (8, 4)):
        table = integers(vocab, 5, seed=1)
        edges = [e for size in (part_sizes(vocab, group.size),) for e in _edges(size)]
        ids = torch.tensor([[edges[(i + j) % len(edges)] for j in range(s)] for i in range(2)])
        dense = table.clone().requires_grad_()
        x = nn.functional.embedding(ids, dense)
        y = nn.functional.linear(x, dense)
        dy = integers(2, s, vocab, seed=2)
        (truth,) = torch.autograd.grad(y, dense, dy)

        embedding = VocabParallelEmbedding(vocab, 5, group=group, sequence_parallel=True)
        embedding.load_dense({"weight": table})
        head = ParallelLMHead(
            5, vocab, False, group=group, gather_output=False, sequence_parallel=True
        )
        head.weight = embedding.weight
        with count_collectives() as counter:
            x_shard = embedding(ids)
        size = x.numel() * x.itemsize
        assert counted(counter) == expected_counts(group, reduce_scatter=(1, size))
        sizes = sequence_sizes(s, group)
        assert_equal(x_shard, x.split(sizes, -2)[group.rank], "embedding")
        logits = head(x_shard, length=s)
        cut = head.shardings["weight"].along(-1)
        assert_equal(logits, cut.split(y, group.rank), "logits")
        (grad,) = torch.autograd.grad(logits, embedding.weight, cut.split(dy, group.rank))
        assert_equal(grad, own(embedding, "weight", truth, group), "dtable")


def _edges(sizes: list[int]) -> list[int]:
    edges, start = [], 0
    for size in sizes:
        edges += [start, start + size - 1] if size else []
        start += size
    return edges


@pytest.mark.parametrize("ranks", RANKS)
def test_embedding_and_head(ranks):
    run_ranks(vocabulary, ranks)
