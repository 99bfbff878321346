"""Layers under torch.autocast give what the dense ones do under it: values, dtypes and gradients.

Inputs are fp32 numbers a little off small integers, which autocast's dtypes round to these; so what is
cast as torch casts it is compared exactly, and what is not cast is another number.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyparallel import autocast, backend
from pyparallel.comm.context import ContextShards
from pyparallel.comm.group import Group
from pyparallel.comm.sequence import sequence_sizes
from pyparallel.cut.shard import even_parts
from pyparallel.layers import (
    ColumnParallelLinear,
    ParallelLMHead,
    ParallelMLP,
    QKVParallelLinear,
    RowParallelLinear,
)
from pyparallel.ops.context.attention import context_parallel_attention
from pyparallel.ops.context.decode import context_parallel_decode
from pyparallel.testing import assert_equal, integers, own, run_ranks

DTYPES = (torch.bfloat16, torch.float16)
# Below half a unit in the last place of every such integer, in either dtype.
OFF = 2.0**-14
S, K, M = 7, 10, 9


def near_integers(*shape: int, seed: int) -> Tensor:
    """fp32, which fp16 and bf16 round to integers."""
    whole = integers(*shape, seed=seed)
    return whole + OFF * (whole != 0)


def dense_linear(k: int, m: int) -> nn.Linear:
    linear = nn.Linear(k, m)
    with torch.no_grad():
        linear.weight.copy_(near_integers(m, k, seed=1))
        linear.bias.copy_(near_integers(m, seed=2))
    return linear


def differentiate(y: Tensor, dy: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, wanted, dy.to(y.dtype))


def column(group: Group, dtype: torch.dtype, sequence: bool) -> None:
    dense = dense_linear(K, M)
    module = ColumnParallelLinear.from_dense(dense, group=group, sequence_parallel=sequence)
    x = near_integers(2, S, K, seed=3).requires_grad_()
    dy = integers(2, S, M, seed=4)
    sizes = sequence_sizes(S, group)
    given = x.detach().split(sizes, 1)[group.rank] if sequence else x.detach()
    given = given.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y, y_shard = dense(x), module(given, length=S)
    cut = module.shardings["weight"].along(-1)
    assert_equal(y_shard, cut.split(y, group.rank), "y")
    dx, *grads = differentiate(y, dy, [x, *dense.parameters()])
    own_dx, *own_grads = differentiate(
        y_shard, cut.split(dy, group.rank), [given, *module.parameters()]
    )
    assert_equal(own_dx, dx.split(sizes, 1)[group.rank] if sequence else dx, "dx")
    for name, grad, dense_grad in zip(("weight", "bias"), own_grads, grads, strict=True):
        assert_equal(grad, own(module, name, dense_grad, group), f"d{name}")


def row(group: Group, dtype: torch.dtype, sequence: bool) -> None:
    dense = dense_linear(K, M)
    module = RowParallelLinear.from_dense(dense, group=group, sequence_parallel=sequence)
    x = near_integers(2, S, K, seed=3).requires_grad_()
    dy = integers(2, S, M, seed=4)
    sizes = sequence_sizes(S, group)

    def tokens(t: Tensor) -> Tensor:
        return t.split(sizes, 1)[group.rank] if sequence else t

    cut = module.shardings["weight"].along(-1)
    given = cut.split(x.detach(), group.rank).clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y, y_shard = dense(x), module(given)
    assert_equal(y_shard, tokens(y), "y")
    dx, *grads = differentiate(y, dy, [x, *dense.parameters()])
    own_dx, *own_grads = differentiate(y_shard, tokens(dy), [given, *module.parameters()])
    assert_equal(own_dx, cut.split(dx, group.rank), "dx")
    for name, grad, dense_grad in zip(("weight", "bias"), own_grads, grads, strict=True):
        assert_equal(grad, own(module, name, dense_grad, group), f"d{name}")


def without_gradients(group: Group, dtype: torch.dtype) -> None:
    """The kernels that know no gradients; a head; weights that several ranks hold."""
    dense, x = dense_linear(K, M), near_integers(2, S, K, seed=3)
    modules = {
        "column": ColumnParallelLinear.from_dense(dense, group=group, gather_output=True),
        "row": RowParallelLinear.from_dense(dense, group=group, input_is_parallel=False),
        "head": ParallelLMHead.from_dense(dense, group=group),
    }
    for what, module in modules.items():
        with torch.autocast("cpu", dtype), torch.no_grad():
            assert_equal(module(x), dense(x), what)
    parts = [dense_linear(K, m) for m in (16, 4, 4)]
    module = QKVParallelLinear.from_dense(*parts, head_dim=4, group=group)
    with torch.autocast("cpu", dtype):
        for ours, part, held in zip(
            module(x), parts, (module.layout.query, module.layout.kv, module.layout.kv), strict=True
        ):
            start, stop = held[group.rank]
            whole = part(x).unflatten(-1, (-1, 4))
            assert_equal(ours, whole[..., start:stop, :], "qkv")
    up, down = dense_linear(K, 6), dense_linear(6, K)
    mlp = ParallelMLP.from_dense(up, down, activation="relu", group=group)
    with torch.autocast("cpu", dtype):
        assert_equal(mlp(x), down(F.relu(up(x))), "mlp")


def context(group: Group, dtype: torch.dtype) -> None:
    """Attention over tokens of all ranks: what it gives for tensors of autocast's dtype."""
    shards = ContextShards(group, even_parts(S, group.shares, dim=1))
    tokens = shards.sizes[group.rank]
    heads = (4, 2, 2)
    given = [near_integers(2, tokens, n, 4, seed=seed) for seed, n in enumerate(heads)]
    wide, low = ([t.clone().to(d).requires_grad_() for t in given] for d in (torch.float32, dtype))
    with torch.autocast("cpu", dtype):
        found = context_parallel_attention(*wide, shards, causal=True)
    expected = context_parallel_attention(*low, shards, causal=True)
    assert_equal(found, expected, "o")
    for ours, theirs in zip(
        torch.autograd.grad(found.float().sum(), wide),
        torch.autograd.grad(expected.float().sum(), low),
        strict=True,
    ):
        assert_equal(ours, theirs.float(), "dq, dk, dv")
    with torch.autocast("cpu", dtype), torch.no_grad():
        q = near_integers(2, 1, 4, 4, seed=9)
        found = context_parallel_decode(q, *wide[1:], group)
    with torch.no_grad():
        assert_equal(found, context_parallel_decode(q.to(dtype), *low[1:], group), "decode")


def check(group: Group) -> None:
    for dtype in DTYPES:
        for sequence in (False, True):
            column(group, dtype, sequence)
            row(group, dtype, sequence)
        without_gradients(group, dtype)
        context(group, dtype)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_as_dense(ranks: int) -> None:
    run_ranks(check, ranks)


def test_the_truth_stays_in_its_own_dtype() -> None:
    q, k, v = (near_integers(1, 3, 2, 4, seed=seed) for seed in (1, 2, 3))
    linear = (near_integers(3, 4, seed=4), near_integers(5, 4, seed=5))
    with backend.use("reference"):
        expected = backend.call("attention", q, k, v), backend.call("linear", *linear)
        with torch.autocast("cpu", torch.bfloat16):
            found = backend.call("attention", q, k, v), backend.call("linear", *linear)
    for name, ours, truth in zip(("attention", "linear"), found, expected, strict=True):
        assert_equal(ours, truth, name)


def test_what_is_cast() -> None:
    given = (
        torch.zeros(2),
        None,
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2, dtype=torch.float16),
        torch.zeros(2, device="meta"),
    )
    assert not autocast.is_on()
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast.is_on()
        found = [None if t is None else t.dtype for t in autocast.lowered(*given)]
    low = torch.bfloat16
    assert found == [low, None, torch.float64, torch.long, low, torch.float32]
