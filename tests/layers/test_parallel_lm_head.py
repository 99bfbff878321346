"""ParallelLMHead against nn.Linear; the draws themselves are tested in test_next_token.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.layers import ParallelLMHead, VocabParallelEmbedding
from pyparallel.ops.next_token import Sampling
from pyparallel.testing import assert_equal, integers, own, run_ranks


def exact(group: Group) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        # Uneven, and fewer ids than ranks: a rank without any.
        for vocab, bias in ((13, True), (2, False)):
            what = f"{dtype} V={vocab}"
            dense = nn.Linear(5, vocab, bias, dtype=dtype)
            for seed, parameter in enumerate(dense.parameters()):
                parameter.data = integers(*parameter.shape, seed=seed, dtype=dtype)
            x = integers(6, 5, seed=3, dtype=dtype).requires_grad_()
            dy = integers(6, vocab, seed=4, dtype=dtype)
            truth = dense(x)
            dense_dx, *dense_grads = torch.autograd.grad(truth, [x, *dense.parameters()], dy)

            head = ParallelLMHead.from_dense(dense, group=group)
            assert_equal(head(x), truth, what)
            dx, *grads = torch.autograd.grad(head(x), [x, *head.parameters()], dy)
            assert_equal(dx, dense_dx, what + " dx")
            for name, grad, dense_grad in zip(("weight", "bias"), grads, dense_grads, strict=False):
                assert_equal(grad, own(head, name, dense_grad, group), f"{what} d{name}")

            several = group.size > 1
            cut = head.shardings["weight"].along(-1)
            local = ParallelLMHead.from_dense(dense, group=group, gather_output=False)
            assert_equal(local(x), cut.split(truth, group.rank), what + " local")
            with count_collectives() as counter, torch.no_grad():
                ids = head.greedy(x)
            assert_equal(ids, truth.argmax(-1), what + " greedy")
            # Six rows of an id and a score, whatever the vocabulary.
            assert counter["all_gather"] == several
            assert counter["all_gather", "bytes"] == several * group.size * 6 * 2 * 8
            with torch.no_grad():
                one = head.sample(x, Sampling(temperature=1e-9), torch.arange(6))
            assert (truth.gather(-1, one.unsqueeze(-1)) == truth.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_dense_exactly_on_integers(ranks):
    run_ranks(exact, ranks)


def tied(group: Group) -> None:
    embedding = VocabParallelEmbedding(11, 4, group=group)
    head = ParallelLMHead(4, 11, bias=False, group=group)
    assert embedding.shardings["weight"] == head.shardings["weight"]
    head.weight = embedding.weight
    ids = torch.arange(11)
    logits = head(embedding(ids))
    whole = head.shardings["weight"].join(
        [part.detach() for part in gather_parts(embedding.weight, head, group)]
    )
    torch.testing.assert_close(logits, whole @ whole.t(), rtol=1e-5, atol=1e-5)


def gather_parts(weight, head, group):
    from pyparallel.comm.collectives import all_gather_raw

    sizes = head.shardings["weight"].sizes
    return all_gather_raw(weight.detach(), group, sizes=sizes).split(sizes)


def test_it_can_share_the_embedding():
    run_ranks(tied, 3)
