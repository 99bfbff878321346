"""SequenceParallelDropout: one mask for every number of ranks, with the right rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyparallel import backend, reference
from pyparallel.comm.group import Group
from pyparallel.comm.sequence import gather_sequence, sequence_sizes, split_sequence
from pyparallel.layers import SequenceParallelDropout
from pyparallel.ops.dropout import dropout
from pyparallel.testing import assert_equal, normals, run_ranks

SHAPES = ((2, 7, 33), (5, 3), (1, 4, 1), (2, 2, 8, 5))


def dense_mask(shape: tuple[int, ...], p: float, seed: int) -> torch.Tensor:
    """The mask of a whole tensor, written out."""
    index = torch.arange(torch.Size(shape).numel()).view(shape)
    return reference.dropout_keep(index, p, seed)


def module_runs(group: Group) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(7)
    module = SequenceParallelDropout(0.3, group=group)
    results = []
    for shape in SHAPES:
        x = normals(*shape, seed=1).requires_grad_()
        dy = normals(*shape, seed=2)
        y = module(split_sequence(x, group), length=shape[-2])
        whole = gather_sequence(y, group, length=shape[-2])
        (grad,) = torch.autograd.grad(whole, x, dy)
        results.append((whole.detach(), grad))
    return results


def test_does_not_depend_on_the_number_of_ranks():
    (dense,) = run_ranks(module_runs, 1)
    torch.manual_seed(7)
    for shape, (y, grad) in zip(SHAPES, dense, strict=True):
        seed = int(torch.randint(-(2**63), 2**63 - 1, ()))
        keep = dense_mask(shape, 0.3, seed)
        scale = 1.0 / 0.7
        assert_equal(y, torch.where(keep, normals(*shape, seed=1) * scale, 0.0), "y")
        assert_equal(grad, torch.where(keep, normals(*shape, seed=2) * scale, 0.0), "dx")
    for ranks in (2, 3, 4):
        for results in run_ranks(module_runs, ranks):
            for (y, grad), (dense_y, dense_grad) in zip(results, dense, strict=True):
                assert_equal(y, dense_y, f"R={ranks}")
                assert_equal(grad, dense_grad, f"R={ranks} dx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_shards_of_the_mask(dtype):
    x = normals(3, 11, 8, seed=1, dtype=dtype)
    with backend.use("torch"):
        expected = dropout(x, 0.4, seed=9)
    assert_equal(dropout(x, 0.4, seed=9), expected, "the kernel and torch's integers")
    for seed in (0, 1, -5, 2**63 + 11, 123456789012345):
        whole = dropout(x, 0.4, seed=seed)
        assert_equal(whole != 0, dense_mask((3, 11, 8), 0.4, seed), f"seed {seed}")
        start = 0
        for size in (4, 4, 2, 1):
            part = dropout(x[:, start : start + size], 0.4, seed=seed, length=11, start=start)
            assert_equal(part, whole[:, start : start + size], f"seed {seed} from {start}")
            start += size


def test_rate_and_independence():
    """Counts of a million draws within 4 standard deviations, for neighbours in every direction too."""
    n = 1 << 20
    for p in (0.1, 0.5, 0.9):
        keep = [dense_mask((64, 1024, 16), p, seed) for seed in (1, 2)]
        for first, second in (
            (keep[0], keep[0]),
            (keep[0], keep[1]),
            (keep[0], keep[0].roll(1, 0)),
            (keep[0], keep[0].roll(1, 1)),
            (keep[0], keep[0].roll(1, 2)),
        ):
            chance = (1 - p) if first is second else (1 - p) ** 2
            found = int((first & second).sum())
            assert abs(found - n * chance) < 4 * math.sqrt(n * chance * (1 - chance)), p


def composed(group: Group) -> None:
    """Recomputation draws the same mask; evaluation and p = 0 draw nothing; p = 1 drops all."""
    module = SequenceParallelDropout(0.5, group=group)
    x = normals(8 // group.size, 16, seed=1).requires_grad_()
    torch.manual_seed(3)
    plain = module(x)
    torch.manual_seed(3)
    again = checkpoint(module, x, use_reentrant=False)
    assert_equal(again, plain, "recomputed forward")
    (expected,) = torch.autograd.grad(plain, x, torch.ones_like(x))
    (grad,) = torch.autograd.grad(again, x, torch.ones_like(x))
    assert_equal(grad, expected, "recomputed backward")
    state = torch.get_rng_state()
    assert module.eval()(x) is x
    assert SequenceParallelDropout(0.0, group=group)(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    everything = SequenceParallelDropout(1.0, group=group)(x)
    assert not everything.any()
    assert module.train()(x).ne(module(x)).any(), "two calls drew one mask"


@pytest.mark.parametrize("ranks", [1, 2])
def test_recompute_evaluation_and_the_ends(ranks):
    run_ranks(composed, ranks)


def test_keeps_nothing_but_the_seed():
    kept = []
    x = torch.ones(4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda none: none):
        dropout(x, 0.5, seed=1)
    assert kept == []


def test_from_dense_and_errors():
    group = Group.single()
    assert SequenceParallelDropout.from_dense(nn.Dropout(0.2), group=group).p == 0.2
    with pytest.raises(ValueError, match=r"p: expected 0 <= p <= 1, got 1\.5"):
        SequenceParallelDropout(1.5, group=group)
    with pytest.raises(ValueError, match="inplace: expected False"):
        SequenceParallelDropout(0.5, True, group=group)
    with pytest.raises(ValueError, match=r"p: expected 0 <= p <= 1, got -0\.1"):
        dropout(torch.ones(2, 2), -0.1, seed=0)
    with pytest.raises(ValueError, match="tokens from start=3 on do not lie within length=4"):
        dropout(torch.ones(2, 2), 0.5, seed=0, length=4, start=3)
    assert sequence_sizes(4, group) == [4]
