"""ParallelMLP against the dense projections: forward, every gradient."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pyparallel import reference
from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.layers import ParallelMLP
from pyparallel.layers.parallel_mlp import GATED, POINTWISE
from pyparallel.testing import assert_as_dense, assert_equal, integers, normals, own, run_ranks
from tests.orders import farthest

# (H, F): uneven, fewer features than ranks, more grains than ranks.
SHAPES = ((6, 33), (5, 2), (8, 130))


def dense_mlp(x, up, up_bias, down, down_bias, activation):
    hidden = F.linear(x, up, up_bias)
    if activation in GATED:
        hidden = reference.gated_activation(hidden, GATED[activation])
    else:
        hidden = reference.activation(hidden, activation)
    return F.linear(hidden, down, down_bias)


def inputs(hidden: int, width: int, activation: str, bias: bool, dtype, make) -> dict:
    rows = width * (2 if activation in GATED else 1)
    tensors = {"x": make(2, 3, hidden, seed=1, dtype=dtype)}
    tensors["up"] = make(rows, hidden, seed=2, dtype=dtype)
    tensors["up_bias"] = make(rows, seed=3, dtype=dtype) if bias else None
    tensors["down"] = make(hidden, width, seed=4, dtype=dtype)
    tensors["down_bias"] = make(hidden, seed=5, dtype=dtype) if bias else None
    return tensors


def run_dense(tensors: dict, dy, activation: str, dtype) -> tuple[torch.Tensor, dict]:
    cast = {n: t.to(dtype).requires_grad_() for n, t in tensors.items() if t is not None}
    y = dense_mlp(*(cast.get(name) for name in tensors), activation)
    grads = torch.autograd.grad(y, list(cast.values()), dy.to(dtype))
    return y.detach(), dict(zip(cast, grads, strict=True))


def run_parallel(tensors: dict, dy, activation: str, group: Group):
    width = tensors["down"].shape[1]
    bias = tensors["up_bias"] is not None
    module = ParallelMLP(dy.shape[-1], width, activation, bias, dtype=dy.dtype, group=group)
    module.up_proj.load_dense({"weight": tensors["up"], "bias": tensors["up_bias"]})
    module.down_proj.load_dense({"weight": tensors["down"], "bias": tensors["down_bias"]})
    x = tensors["x"].clone().requires_grad_()
    with count_collectives() as forward:
        y = module(x)
    assert forward["all_reduce"] == (group.size > 1)
    parameters = {"up": (module.up_proj, "weight"), "down": (module.down_proj, "weight")}
    if bias:
        parameters |= {"up_bias": (module.up_proj, "bias"), "down_bias": (module.down_proj, "bias")}
    wanted = [x, *(getattr(m, name) for m, name in parameters.values())]
    with count_collectives() as backward:
        grads = torch.autograd.grad(y, wanted, dy)
    assert backward["all_reduce"] == (group.size > 1)
    return module, y, dict(zip(("x", *parameters), grads, strict=True)), parameters


def exact(group: Group, shapes) -> None:
    """relu of integers: every step is exact, in fp32."""
    for hidden, width in shapes:
        tensors = inputs(hidden, width, "relu", True, torch.float32, integers)
        dy = integers(2, 3, hidden, seed=6)
        truth, truth_grads = run_dense(tensors, dy, "relu", torch.float32)
        _, y, grads, parameters = run_parallel(tensors, dy, "relu", group)
        assert_equal(y, truth, f"{hidden} {width}")
        assert_equal(grads.pop("x"), truth_grads["x"], f"{hidden} {width} dx")
        for name, grad in grads.items():
            expected = own(*parameters[name], truth_grads[name], group)
            assert_equal(grad, expected, f"{hidden} {width} d{name}")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_dense_exactly_on_integers(ranks):
    run_ranks(exact, ranks, SHAPES)


@settings(max_examples=4)
@given(
    ranks=st.integers(2, 4),
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 200)), min_size=6, max_size=6),
)
def test_any_shape(ranks, shapes):
    run_ranks(exact, ranks, shapes)


def every_activation(group: Group) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for index, activation in enumerate((*GATED, *POINTWISE)):
            hidden, width = SHAPES[index % len(SHAPES)]
            bias = index % 2 == 0
            what = f"{dtype} {activation} {hidden} {width} bias={bias}"
            tensors = inputs(hidden, width, activation, bias, dtype, normals)
            dy = normals(2, 3, hidden, seed=6, dtype=dtype)
            truth, truth_grads = run_dense(tensors, dy, activation, torch.float64)
            dense, dense_grads = farthest(
                partial(run_dense, tensors, dy, activation, dtype), (truth, truth_grads)
            )
            _, y, grads, parameters = run_parallel(tensors, dy, activation, group)
            assert_as_dense(y, dense, truth, group.size, what)
            for name, grad in grads.items():
                part = None if name == "x" else partial(own, *parameters[name], group=group)
                pair = dense_grads[name], truth_grads[name]
                assert_as_dense(grad, *pair, group.size, f"{what} d{name}", part=part)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_activation(ranks):
    run_ranks(every_activation, ranks)


def survives(group: Group) -> None:
    gate, up, down = nn.Linear(4, 10), nn.Linear(4, 10), nn.Linear(10, 4)
    for seed, linear in enumerate((gate, up, down)):
        for parameter in linear.parameters():
            parameter.data = normals(*parameter.shape, seed=seed)
    module = ParallelMLP.from_dense(up, down, gate, activation="swiglu", group=group)
    x = normals(3, 4, seed=9)
    truth = down(F.silu(gate(x)) * up(x))
    torch.testing.assert_close(module(x), truth, rtol=1e-5, atol=1e-5)
    assert_equal(copy.deepcopy(module)(x), module(x), "deepcopy")
    assert copy.deepcopy(module).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    meta = ParallelMLP(4, 10, "swiglu", True, device="meta", group=group)
    meta.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert_equal(meta(x), module(x), "meta, then loaded")
    torch.manual_seed(1)
    one = ParallelMLP(4, 10, "geglu", group=Group.single())
    torch.manual_seed(1)
    several = ParallelMLP(4, 10, "geglu", group=group)
    for part in ("up_proj", "down_proj"):
        ours, whole = getattr(several, part), getattr(one, part)
        assert_equal(ours.weight, own(ours, "weight", whole.weight, group), f"seeded {part}")


@pytest.mark.parametrize("ranks", [1, 3])
def test_survives_copies_casts_and_meta(ranks):
    run_ranks(survives, ranks)


def test_bad_activations_are_named():
    group = Group.single()
    with pytest.raises(ValueError, match=r"activation: expected one of swiglu, .*, got 'tanh'"):
        ParallelMLP(4, 8, "tanh", group=group)
    up, down = nn.Linear(4, 8), nn.Linear(8, 4)
    with pytest.raises(ValueError, match="gate: 'swiglu' takes a gate"):
        ParallelMLP.from_dense(up, down, activation="swiglu", group=group)
    with pytest.raises(ValueError, match="gate: 'gelu' takes no gate"):
        ParallelMLP.from_dense(up, down, up, activation="gelu", group=group)
