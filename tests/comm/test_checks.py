"""What every engine's public methods check: once, with one wording, before the engine is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyparallel.comm.checks import Takes
from pyparallel.comm.communicator import Communicator, Work
from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.comm.hierarchical import HierarchicalCommunicator
from pyparallel.comm.local_engine import LocalCommunicator
from pyparallel.comm.recorded import RecordedCommunicator
from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.comm.torch_engine import TorchCommunicator

ENGINES = (
    HierarchicalCommunicator,
    LocalCommunicator,
    NcclCommunicator,
    RecordedCommunicator,
    SharedMemoryCommunicator,
    TorchCommunicator,
)


class Recorder(LocalCommunicator):
    """Rank 1 of 2, whose calls reach nobody: what was issued is written down."""

    takes = Takes("cpu", moved=(torch.float32, torch.int8), reduced=(torch.float32,))

    def __init__(self) -> None:
        super().__init__("pair")
        self.rank, self.size = 1, 2
        self.issued: list[tuple[str, Any]] = []

    def _issue(self, async_op: bool, call: Callable[..., Any], *arguments: Any) -> Work | None:
        rest = [argument for argument in arguments if not isinstance(argument, torch.Tensor)]
        self.issued.append((call.__name__, rest))
        return Work() if async_op else None


def test_no_engine_overrides_a_public_method() -> None:
    public = {name for name in vars(Communicator) if callable(getattr(Communicator, name))}
    public = {name for name in public if not name.startswith("_")}
    assert len(public) == 9
    assert all(getattr(getattr(Communicator, name), "__final__", False) for name in public)
    assert {cls for cls in Communicator.__subclasses__() if "pyparallel" in cls.__module__} == set(
        ENGINES
    )
    for engine in ENGINES:
        assert not public & set(vars(engine)), engine


def test_an_algorithm_gets_every_rank_s_count() -> None:
    comm, x = Recorder(), torch.ones
    comm.all_reduce(x(3), op="max")
    comm.all_gather(x(6), x(3))
    comm.all_gather(x(2, 2), x(1), counts=(3, 1))
    comm.reduce_scatter(x(3), x(6))
    comm.all_to_all(x(4), x(3), input_counts=[1, 2])
    comm.broadcast(x(1), 0)
    comm.send(x(1), 0, tag=3)
    comm.recv(x(1), 0)
    comm.barrier()
    assert isinstance(comm.all_reduce(x(3), async_op=True), Work)
    assert comm.issued == [
        ("_all_reduce", ["max"]),
        ("_all_gather", [[3, 3]]),
        ("_all_gather", [[3, 1]]),
        ("_reduce_scatter", [[3, 3], "sum"]),
        ("_all_to_all", [[2, 2], [1, 2]]),
        ("_broadcast", [0]),
        ("_send", [0, 3]),
        ("_recv", [0, 0]),
        ("_barrier", []),
        ("_all_reduce", ["sum"]),
    ]


X = torch.ones(6)
WRONG: dict[str, Callable[[Communicator], object]] = {
    "all_reduce: op: expected one of sum, max, min, got 'prod'; gather the parts where another is "
    "needed": lambda c: c.all_reduce(X, op="prod"),
    "all_reduce: tensor: expected a type of float32, got torch.int8; convert it first": lambda c: (
        c.all_reduce(X.to(torch.int8))
    ),
    "all_reduce: tensor: expected a tensor on cpu, got one on meta; pass tensor.to('cpu')": lambda c: (
        c.all_reduce(X.to("meta"))
    ),
    "all_reduce: tensor: expected a contiguous tensor, got strides (1, 2) for shape (2, 3); pass "
    "tensor.contiguous()": lambda c: c.all_reduce(X.view(3, 2).t()),
    "all_reduce: tensor: expected resolved values, got a lazy negation or conjugation; pass "
    "tensor.resolve_neg().resolve_conj()": lambda c: c.all_reduce(torch._neg_view(X)),
    "all_gather: output: expected a type of float32, int8, got torch.int16; view it as "
    "torch.uint8": lambda c: c.all_gather(X.short(), X[:3].short()),
    "all_gather: input: expected output's torch.float32 on cpu, got torch.float64 on cpu; convert "
    "one with .to()": lambda c: c.all_gather(X, X[:3].double()),
    "all_gather: output: expected 2 x input's 3 elements, got 5; give counts= where the parts are "
    "uneven": lambda c: c.all_gather(X[:5], X[:3]),
    "all_gather: counts: expected 2 numbers from 0 that sum to output's 6 elements, got [3, 4]; give "
    "one for each rank": lambda c: c.all_gather(X, X[:3], counts=[3, 4]),
    "all_gather: counts: expected 2 numbers from 0 that sum to output's 6 elements, got [7, -1]; "
    "give one for each rank": lambda c: c.all_gather(X, X[:3], counts=[7, -1]),
    "all_gather: counts: expected 2 numbers from 0 that sum to output's 6 elements, got [6]; give "
    "one for each rank": lambda c: c.all_gather(X, X, counts=[6]),
    "reduce_scatter: output: expected this rank's counts[1] = 2 elements, got 3; give the same "
    "counts= on all ranks": lambda c: c.reduce_scatter(X[:3], X, counts=[4, 2]),
    "reduce_scatter: input: expected 2 x output's 2 elements, got 6; give counts= where the parts "
    "are uneven": lambda c: c.reduce_scatter(X[:2], X),
    "all_to_all: output: expected a multiple of 2 ranks' elements, got 5; give output_counts= where "
    "the parts are uneven": lambda c: c.all_to_all(X[:5], X),
    "all_to_all: input_counts: expected 2 numbers from 0 that sum to input's 6 elements, got "
    "[1, 1]; give one for each rank": lambda c: c.all_to_all(X, X, input_counts=[1, 1]),
    "broadcast: src: expected a rank from 0 to 1, got 2; name it by its place in the "
    "group": lambda c: c.broadcast(X, 2),
    "send: dst: expected another rank than this one, 1, got 1, but the group 'pair' has 2 ranks; "
    "name it by its place in the group": lambda c: c.send(X, 1),
    "recv: src: expected another rank than this one, 1, got -1, but the group 'pair' has 2 ranks; "
    "name it by its place in the group": lambda c: c.recv(X, -1),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named_and_nothing_is_issued(message: str) -> None:
    comm = Recorder()
    with pytest.raises(ValueError) as caught:
        WRONG[message](comm)
    assert str(caught.value) == message
    assert not comm.issued
