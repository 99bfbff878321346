"""SequenceParallelLayerNorm and SequenceParallelRMSNorm against torch's modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.comm.sequence import sequence_sizes
from pyparallel.layers import SequenceParallelLayerNorm, SequenceParallelRMSNorm
from pyparallel.testing import assert_equal, assert_within, normals, run_ranks
from tests.bounds import norm_bounds

# (dense module, the one that is compared with it)
KINDS = (
    (lambda h: nn.LayerNorm(h, 1e-5), SequenceParallelLayerNorm),
    (lambda h: nn.LayerNorm(h, 1e-6, bias=False), SequenceParallelLayerNorm),
    (lambda h: nn.LayerNorm(h, elementwise_affine=False), SequenceParallelLayerNorm),
    (lambda h: nn.RMSNorm(h, 1e-6), SequenceParallelRMSNorm),
    (lambda h: nn.RMSNorm(h), SequenceParallelRMSNorm),
    (lambda h: nn.RMSNorm(h, elementwise_affine=False), SequenceParallelRMSNorm),
)


def as_dense(group: Group) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for number, (make, kind) in enumerate(KINDS):
            for lead, s, h in (((2,), 7, 33), ((), 4, 1), ((3,), 8, 64)):
                what = f"{dtype} {kind.__name__} {number} {lead} S={s} H={h}"
                dense = make(h).to(dtype)
                for seed, parameter in enumerate(dense.parameters()):
                    with torch.no_grad():
                        parameter.copy_(normals(h, seed=seed, dtype=dtype))
                truth = copy.deepcopy(dense).double()
                if getattr(truth, "eps", 0) is None:
                    truth.eps = torch.finfo(dtype).eps
                x = normals(*lead, s, h, seed=5, dtype=dtype)
                dy = normals(*lead, s, h, seed=6, dtype=dtype)
                given = x.double().requires_grad_()
                true_y = truth(given)
                expected = (
                    true_y.detach(),
                    *torch.autograd.grad(true_y, [given, *truth.parameters()], dy.double()),
                )
                bounds = norm_bounds(
                    x,
                    dy,
                    dense.weight,
                    getattr(dense, "bias", None),
                    truth.eps,
                    centred=kind is SequenceParallelLayerNorm,
                    parts=group.size,
                )
                module = kind.from_dense(dense, group=group)
                sizes = sequence_sizes(s, group)
                x_shard = x.split(sizes, -2)[group.rank].clone().requires_grad_()
                with count_collectives() as forward:
                    y = module(x_shard)
                with count_collectives() as backward:
                    grads = torch.autograd.grad(
                        y, [x_shard, *module.parameters()], dy.split(sizes, -2)[group.rank]
                    )
                for (name, bound), actual, exact in zip(
                    bounds.items(), (y, *grads), expected, strict=False
                ):
                    if name in ("y", "dx"):
                        exact, bound = (t.split(sizes, -2)[group.rank] for t in (exact, bound))
                    assert actual.dtype == dtype
                    assert_within(actual, exact, bound, f"{what} {name}")
                assert not forward, what
                count = len(list(module.parameters()))
                counted = {}
                if count and group.size > 1:
                    num_bytes = count * h * x.itemsize
                    counted = {"all_reduce": 1, ("all_reduce", "bytes"): num_bytes}
                assert dict(backward) == counted, what


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_as_dense(ranks):
    run_ranks(as_dense, ranks)


def survives(group: Group) -> None:
    for kind in (SequenceParallelLayerNorm, SequenceParallelRMSNorm):
        module = kind(6, group=group)
        x = normals(4, 6, seed=1)
        copied = copy.deepcopy(module)
        assert copied.group is group and copied.weight is not module.weight
        assert_equal(copied(x), module(x), "deepcopy")
        meta = kind(6, device="meta", group=group)
        meta.to_empty(device="cpu").load_state_dict(module.state_dict())
        assert_equal(meta(x), module(x), "meta, then loaded")
        assert module.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_survive_copies_casts_and_meta():
    run_ranks(survives, 2)


def test_frozen_dense_stays_frozen():
    for dense, kind in (
        (nn.LayerNorm(4), SequenceParallelLayerNorm),
        (nn.RMSNorm(4), SequenceParallelRMSNorm),
    ):
        dense.weight.requires_grad_(False)
        module = kind.from_dense(dense, group=Group.single())
        assert not module.weight.requires_grad
        assert module.weight.data_ptr() != dense.weight.data_ptr()
        assert module.eps == dense.eps


def test_more_than_the_last_axis_is_refused():
    with pytest.raises(ValueError, match="normalized_shape: expected the last axis alone"):
        SequenceParallelLayerNorm((3, 4), group=Group.single())
