"""VocabParallelEmbedding against nn.Embedding: bit for bit, since one rank gives each row."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.layers import VocabParallelEmbedding
from pyparallel.testing import assert_equal, normals, own, run_ranks

# (V, H): uneven, fewer rows than ranks, one row.
SHAPES = ((11, 5), (64, 8), (2, 3), (1, 4))


def exact(group: Group) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for vocab, hidden in SHAPES:
            for padding, by_freq, sparse in (
                (None, False, False),
                (vocab - 1, False, False),
                (-vocab, True, False),
                (None, False, True),
            ):
                what = f"{dtype} V={vocab} padding={padding} by_freq={by_freq} sparse={sparse}"
                dense = nn.Embedding(
                    vocab, hidden, padding, scale_grad_by_freq=by_freq, sparse=sparse, dtype=dtype
                )
                dense.weight.data = normals(vocab, hidden, seed=1, dtype=dtype)
                module = VocabParallelEmbedding.from_dense(dense, group=group)
                ids = torch.arange(12).view(3, 4) * 5 % vocab
                dy = normals(3, 4, hidden, seed=2, dtype=dtype)
                with count_collectives() as forward:
                    y = module(ids)
                assert_equal(y, dense(ids), what)
                with count_collectives() as backward:
                    y.backward(dy)
                dense(ids).backward(dy)
                grad, dense_grad = module.weight.grad, dense.weight.grad
                if sparse:
                    dense_grad = dense_grad.to_dense()
                    grad = grad.to_dense() if grad.is_sparse else grad
                assert_equal(grad, own(module, "weight", dense_grad, group), what + " dweight")
                assert forward["all_reduce"] == (group.size > 1) and not backward, what
        assert module(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, hidden)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_dense_exactly(ranks):
    run_ranks(exact, ranks)


def survives(group: Group) -> None:
    torch.manual_seed(5)
    dense = nn.Embedding(10, 6, padding_idx=3)
    torch.manual_seed(5)
    module = VocabParallelEmbedding(10, 6, padding_idx=3, group=group)
    assert_equal(module.weight, own(module, "weight", dense.weight, group), "seeded")
    ids = torch.arange(10)
    assert_equal(copy.deepcopy(module)(ids), module(ids), "deepcopy")
    assert copy.deepcopy(module).bfloat16()(ids).dtype == torch.bfloat16
    meta = VocabParallelEmbedding(10, 6, device="meta", group=group)
    meta.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert_equal(meta(ids), module(ids), "meta, then loaded")


@pytest.mark.parametrize("ranks", [1, 3])
def test_survives_copies_casts_and_meta(ranks):
    run_ranks(survives, ranks)


def outside(group: Group) -> None:
    module = VocabParallelEmbedding(10, 4, group=group)
    for ids in ([0, 10], [-1, 2]):
        with pytest.raises((IndexError, RuntimeError), match=r"ids|index out of range"):
            module(torch.tensor(ids))


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_id_outside_the_vocabulary_is_an_error(ranks):
    run_ranks(outside, ranks)


def test_bad_options_are_named():
    group = Group.single()
    with pytest.raises(ValueError, match="max_norm"):
        VocabParallelEmbedding(4, 2, max_norm=1.0, group=group)
    with pytest.raises(ValueError, match="padding_idx: expected an id below 4, got 4"):
        VocabParallelEmbedding(4, 2, padding_idx=4, group=group)
