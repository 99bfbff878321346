"""The registered collectives: opcheck, torch.compile(fullgraph=True), inference mode, odd tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pyparallel.comm.compiled
from pyparallel.comm import collectives as C
from pyparallel.comm import raw as raw
from pyparallel.comm.group import Group
from pyparallel.testing import run_ranks

OPS = torch.ops.pyparallel
UNEVEN = [3, 1]


def check_operators(group: Group) -> None:
    x = torch.randn(4, 6)
    handle = group.handle
    samples = [
        (OPS.all_reduce_, (x.clone(), "sum", handle)),
        (OPS.all_gather, (x[: UNEVEN[group.rank]], 0, UNEVEN, handle)),
        (OPS.all_gather, (x.t()[:, : UNEVEN[group.rank]], 1, UNEVEN, handle)),
        (OPS.reduce_scatter, (x, 0, UNEVEN, "max", handle)),
        (OPS.reduce_scatter, (x.t(), 1, [2, 2], "sum", handle)),
        (OPS.all_to_all, (x[:2], 1, 0, [2, 4], [2, 2], handle)),
        (OPS.broadcast_, (x.clone(), 1, handle)),
    ]
    for operator, arguments in samples:
        torch.library.opcheck(operator.default, arguments)


def test_opcheck() -> None:
    run_ranks(check_operators, 2)


def everything(x: Tensor, weight: Tensor, group: Group) -> Tensor:
    """Every collective with autograd, in one graph."""
    x = C.copy_to_group(x, group)
    y = C.all_reduce(x @ weight, group)
    gathered = C.all_gather(y * (group.rank + 1), group, dim=1)
    scattered = C.reduce_scatter(gathered.sin(), group, dim=0, sizes=UNEVEN)
    joined = C.all_gather(scattered, group, dim=0, sizes=UNEVEN, grad="split")
    turned = C.all_to_all(C.split(joined, group, dim=0), group, split_dim=1, join_dim=0)
    return (turned * turned.abs()).sum()


def check_compiled(group: Group) -> None:
    generator = torch.Generator().manual_seed(group.rank)
    results = []
    for call in (everything, torch.compile(everything, fullgraph=True, backend="aot_eager")):
        x = torch.randn(4, 6, generator=generator.manual_seed(group.rank)).requires_grad_()
        weight = torch.randn(6, 6, generator=generator.manual_seed(7)).requires_grad_()
        with C.count_collectives() as counter:
            loss = call(x, weight, group)
            loss.backward()
        results.append((loss.detach(), x.grad, weight.grad, dict(counter)))
    eager, compiled = results
    for expected, actual in zip(eager[:3], compiled[:3], strict=True):
        assert torch.equal(expected, actual)
    assert eager[3] == compiled[3], "the compiled graph makes the same collectives"


def test_compiled_in_one_graph_forward_and_backward() -> None:
    run_ranks(check_compiled, 2)


def check_inductor(group: Group) -> None:
    def body(x: Tensor) -> Tensor:
        return C.all_gather(C.all_reduce(x * 2, group) + 1, group, dim=0).relu()

    x = torch.arange(-6.0, 6.0).view(4, 3)
    compiled = torch.compile(body, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(x), body(x))


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    run_ranks(check_inductor, 2, timeout_s=300.0)


def check_inference(group: Group) -> None:
    with torch.inference_mode():
        x = torch.arange(12.0).view(3, 4)
        assert torch.equal(C.all_reduce(x, group), 2 * x)
        assert torch.equal(C.all_gather(x, group), torch.cat([x, x]))
        assert torch.equal(C.reduce_scatter(x, group, dim=1), 2 * x.chunk(2, 1)[group.rank])
        turned = C.all_to_all(x, group, split_dim=1, join_dim=0)
        assert torch.equal(turned, x.chunk(2, 1)[group.rank].repeat(2, 1))


def test_inference_mode() -> None:
    run_ranks(check_inference, 2)


def check_layouts(group: Group) -> None:
    base = torch.arange(24.0).view(2, 3, 4)
    views: list[Callable[[], Tensor]] = [
        lambda: base.transpose(0, 2),
        lambda: base[:, ::2],
        lambda: base[:, :0],
        lambda: torch.empty(0),
        lambda: base[0, 0, :1].squeeze(),
    ]
    for view in views:
        x = view()
        assert torch.equal(C.all_reduce(x, group), 2 * x)
        assert torch.equal(view(), x), "the input of all_reduce stays as it is"
        if x.dim():
            assert torch.equal(C.all_gather(x, group, dim=-1), torch.cat([x, x], -1))
            sizes = [x.shape[-1], 0]
            part = C.reduce_scatter(x, group, dim=-1, sizes=sizes)
            assert torch.equal(part, 2 * x.split(sizes, -1)[group.rank])
    handle = raw.all_reduce_raw(base.transpose(0, 1), group, async_op=True)
    assert torch.equal(handle.wait(), 2 * base.transpose(0, 1))


def test_non_contiguous_and_empty_tensors() -> None:
    run_ranks(check_layouts, 2)


def test_a_handle_of_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="handle: expected one of a living group"):
        pyparallel.comm.compiled._all_reduce_(torch.ones(2), "sum", 10**9)
