"""LayerNorm, RMSNorm and HeadRMSNorm against torch's modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyparallel import backend
from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.cut.shard import part_sizes
from pyparallel.layers import LayerNorm, RMSNorm
from pyparallel.layers.norm import HeadRMSNorm
from pyparallel.testing import assert_within, normals, run_ranks
from tests.bounds import norm_bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layer", "rms", "rms_without_eps"])
@pytest.mark.parametrize("name", ["torch", "reference"])
def test_equals_torchs_module(kind, dtype, name):
    ours, theirs = {
        "layer": (LayerNorm(7, 1e-3), nn.LayerNorm(7, 1e-3)),
        "rms": (RMSNorm(7, 1e-3), nn.RMSNorm(7, 1e-3)),
        "rms_without_eps": (RMSNorm(7), nn.RMSNorm(7)),
    }[kind]
    for parameter in theirs.parameters():
        parameter.data = normals(7, seed=3)
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    # Rows of all zeros, where the epsilon decides.
    x = torch.cat([normals(4, 7, seed=1, dtype=dtype), torch.zeros(1, 7, dtype=dtype)])
    wide = {"layer": nn.LayerNorm(7, 1e-3), "rms": nn.RMSNorm(7, 1e-3)}.get(
        kind, nn.RMSNorm(7, torch.finfo(dtype).eps)
    )
    wide.load_state_dict(theirs.state_dict())
    with backend.use(name):
        actual = ours(x)
    bias = getattr(theirs, "bias", None)
    bounds = norm_bounds(x, x, theirs.weight, bias, wide.eps, centred=kind == "layer")
    assert_within(actual, wide.double()(x.double()), bounds["y"], kind)


def test_norms_of_several_axes_are_refused():
    for kind in (LayerNorm, RMSNorm):
        with pytest.raises(ValueError, match=r"normalized_shape: expected the last axis.*\(2, 3\)"):
            kind((2, 3))


def heads(group: Group) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        module = HeadRMSNorm(6, 1e-5, group=group, dtype=dtype)
        module.weight.data = normals(6, seed=1, dtype=dtype)
        x, dy = (normals(2, 3, 9, 6, seed=s, dtype=dtype) for s in (2, 3))
        dense = nn.RMSNorm(6, 1e-5, dtype=torch.float64)
        dense.weight.data = module.weight.detach().double()
        leaf = x.double().requires_grad_()
        true_y = dense(leaf)
        true_dx, true_dw = torch.autograd.grad(true_y, [leaf, dense.weight], dy.double())
        bounds = norm_bounds(x, dy, module.weight, None, 1e-5, centred=False, parts=group.size)
        sizes = part_sizes(9, group.size)
        part = slice(sum(sizes[: group.rank]), sum(sizes[: group.rank + 1]))
        own_x = x[:, :, part].clone().requires_grad_()
        own_y = module(own_x)
        with count_collectives() as counter:
            own_dx, own_dw = torch.autograd.grad(own_y, [own_x, module.weight], dy[:, :, part])
        for actual, truth, bound, what in (
            (own_y, true_y[:, :, part], bounds["y"][:, :, part], "y"),
            (own_dx, true_dx[:, :, part], bounds["dx"][:, :, part], "dx"),
            (own_dw, true_dw, bounds["dweight"], "dw"),
        ):
            assert_within(actual, truth, bound, f"{dtype} {what}")
        assert counter["all_reduce"] == (group.size > 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_heads_share_one_weight(ranks):
    run_ranks(heads, ranks)
