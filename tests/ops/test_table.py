"""The op x backend table tells the truth: what `select` returns is what executes, on a machine without
a GPU, for every op and every choice, on one rank and on two. In Triton's interpreter these tests run
again from tests/kernels/test_table.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.comm.group import Group
from pyparallel.cut.quantize import PackedWeight, quantize_rows
from pyparallel.ops.all_gather_linear import all_gather_linear
from pyparallel.ops.column_parallel_linear import column_parallel_linear
from pyparallel.ops.dropout import dropout
from pyparallel.ops.linear_reduce_scatter import linear_reduce_scatter
from pyparallel.ops.row_parallel_linear import row_parallel_linear
from pyparallel.testing import normals, run_ranks
from tests.decoding.test_cpu_decoder import LLAMA, build

CHOICES = (None, *backend.BACKENDS)
# Modules, whose ops are chosen one by one when they run: here they are only made.
SESSIONS = ("decode_session", "pipeline_session")
# Rows with a gradient; the others' are ops of their own, or those of the functions below.
DIFFERENTIABLE = {
    "activation",
    "all_reduce_residual_rms_norm",
    "attention",
    "gated_activation",
    "gated_mlp",
    "layer_norm",
    "linear",
    "rms_norm",
    "rope",
}
# What collectives are asked with, and what their rows are given beside that.
COUNTS = {"all_gather": "counts", "reduce_scatter": "counts"}
S, K, M = 3, 6, 5


def calls(group: Group) -> dict[str, tuple]:
    """Real arguments of every op."""
    rank, size = group.rank, group.size
    sizes = [S - r for r in range(size)]
    x, w, b, g = (
        normals(S, K, seed=1),
        normals(M, K, seed=2),
        normals(M, seed=3),
        normals(S, M, seed=6),
    )
    own, wide, grad = (
        normals(S - rank, K, seed=4),
        normals(sum(sizes), K, seed=7),
        normals(sum(sizes), M, seed=8),
    )
    ones, q = torch.ones(K), normals(1, S, 2, 8, seed=5)
    o, lse = torch.zeros(1, S, 2, 8), torch.zeros(1, 2, S)
    ids, cos = torch.arange(S), torch.ones(S, 4)
    loss = (0, M, -100, 0.0, 0.0)
    model = build(LLAMA, group)
    model.pipeline = Group.single()
    data, scale = quantize_rows(w)
    return {
        "activation": (x, "silu"),
        "all_gather": (x.flatten(), group),
        "all_gather_linear": (own, w, b, group, sizes),
        "all_gather_linear_backward": (grad, own, w, group, sizes, (True, True)),
        "all_reduce": (x.clone(), group, "sum"),
        "all_reduce_residual_rms_norm": (x, x, ones, 1e-6, group),
        "attention": (q, q, q),
        "attention_with_lse": (q, q, q),
        "attention_with_lse_backward": (q, q, q, o, lse, q),
        "column_parallel_linear_backward": (g, x, w, group, (True, True)),
        "cross_entropy_gradient_": (g.clone(), ids, torch.zeros(S), torch.ones(S), *loss),
        "cross_entropy_statistics": (g, ids, 0, -100),
        "decode_session": (model, [[1, 2]], 4),
        "dropout": (x, 0.5, torch.tensor(7), S, 0),
        "gated_activation": (x, "silu"),
        "gated_mlp": (x, normals(4, K, seed=9), "silu", group),
        "layer_norm": (x, ones, ones, 1e-5),
        "linear": (x, w, b),
        "linear_all_reduce": (x, w, b, group),
        "linear_dgrad": (g, w),
        "linear_reduce_scatter": (wide, w, b, group, sizes),
        "linear_reduce_scatter_backward": (
            normals(S - rank, M, seed=10),
            wide,
            w,
            group,
            sizes,
            (True, True, True),
        ),
        "linear_wgrad": (g, x),
        "packed_linear": (x, PackedWeight(data, "int8", torch.float32, scale), b),
        "pipeline_session": (model, [[1, 2]], 4, None),
        "reduce_scatter": (x.flatten(), group, "sum"),
        "rms_norm": (x, ones, 1e-6),
        "rope": (q, cos, cos),
    }


def calls_of_tests() -> dict[str, tuple]:
    """Of ops whose own test says it: `TABLE_CALL` in tests/ops/test_<op>.py, differentiable ones'."""
    found = {}
    for path in Path(__file__).parent.glob("test_*.py"):
        if "\nTABLE_CALL = " in path.read_text():
            module = import_module(f"tests.ops.{path.stem}")
            found[path.stem.removeprefix("test_")] = module.TABLE_CALL
    return found


class Seen:
    """What ran: the rows of an op, and the backends whose kernels were entered."""

    def __init__(self, rows: dict[str, Callable]) -> None:
        self.codes = {code_of(run): name for name, run in rows.items()}
        self.rows: set[str] = set()
        self.kernels: set[str] = set()

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code in self.codes:
                self.rows.add(self.codes[code])
            if "triton/runtime/" in code.co_filename and code.co_name == "run":
                self.kernels.add("triton")
        elif event == "c_call":
            name = getattr(argument, "__name__", "")
            if name.startswith(("cpu_", "rank_sum")):
                self.kernels.add("cpu")
            if name.startswith("cuda_"):
                self.kernels.add("cuda")


def code_of(run: Callable) -> Any:
    return run.__init__.__code__ if isinstance(run, type) else run.__code__


@contextmanager
def watched(rows: dict[str, Callable]) -> Iterator[Seen]:
    seen = Seen(rows)
    sys.setprofile(seen)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def rows_of(op: str) -> dict[str, Callable]:
    """What each row of an op runs, where its file can be read here."""
    found: dict[str, Callable] = {}
    for name in backend.BACKENDS:
        row = backend.row(op, name)
        if row is not None and row.file is None and name != "cuda":
            row.read()
        run = None if row is None else getattr(row.file, row.name, None)
        if run is not None:
            found[name] = run
    return found


def takes(op: str, name: str, args: tuple) -> bool:
    row = backend.row(op, name)
    return row is not None and row.reason(*args) is None


def differentiate(y: Any) -> None:
    results = y if isinstance(y, tuple) else (y,)
    total = [t.float().sum() for t in results if isinstance(t, Tensor) and t.requires_grad]
    if total:
        sum(total).backward()


def faults_of(op: str, choice: str | None, args: tuple, fused: bool) -> list[str]:
    """Where the table does not say what happens."""
    where = f"{op} on {choice or 'automatic'}"
    try:
        run = backend.select(op, *args)
    except backend.UnsupportedError as error:
        if choice is None and not fused:
            return [f"{where}: nothing runs it: {error}"]
        names = (choice,) if choice else backend.ORDER
        return [f"{where}: no reason of {name}" for name in names if f"{name}: " not in str(error)]
    rows = rows_of(op)
    taken = choice or next(name for name in backend.ORDER if takes(op, name, args))
    if choice is None and taken not in ("cpu", "torch"):
        return [f"{where}: {taken} is said to run on a CPU"]
    if rows[taken] is not run:
        return [f"{where}: the row of {taken} takes the call, and another was selected"]
    # Two backends may share what runs.
    rows = {name: row for name, row in rows.items() if name == taken or row is not run}
    options = {}
    if op in COUNTS:
        group = args[1]
        each = args[0].numel() // (1 if op == "all_gather" else group.size)
        options = {"counts": [each] * group.size}
    with watched(rows) as seen:
        y = run(*args, **options)
        if op not in SESSIONS:
            differentiate(y)
    faults = []
    if seen.rows != {taken}:
        faults.append(f"{where}: {taken} was taken, and {sorted(seen.rows)} ran")
    if others := seen.kernels - {taken}:
        faults.append(f"{where}: {taken} was taken, and kernels of {sorted(others)} ran")
    return faults


def every_op(group: Group) -> list[str]:
    table = backend.table()
    own = calls_of_tests()
    assert table.keys() == calls(group).keys() | own.keys()
    faults = []
    for choice in CHOICES:
        with backend.use(choice) if choice else nullcontext():
            for wanted in (False, True):
                for op, args in (calls(group) | own).items():
                    if wanted and op not in DIFFERENTIABLE | own.keys():
                        continue
                    if wanted:
                        args = tuple(with_gradient(t) for t in args)
                    with torch.set_grad_enabled(wanted):
                        fused = "torch" not in table[op]
                        faults += faults_of(op, choice, args, fused)
                    group.communicator.barrier()
    return faults


def with_gradient(given: Any) -> Any:
    floating = isinstance(given, Tensor) and given.is_floating_point()
    return given.clone().requires_grad_() if floating else given


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_selected_is_what_runs(ranks):
    for faults in run_ranks(every_op, ranks):
        assert not faults, "\n".join(faults)


def public_functions(group: Group) -> dict[str, Callable[[], Any]]:
    """The public functions whose ops are fused, or differentiated by another op of the table."""
    sizes = [S - r for r in range(group.size)]
    w, b = normals(M, K, seed=1).requires_grad_(), normals(M, seed=2).requires_grad_()
    own = normals(S - group.rank, K, seed=3).requires_grad_()
    x, wide = (normals(n, K, seed=4).requires_grad_() for n in (S, sum(sizes)))
    return {
        "all_gather_linear": lambda: all_gather_linear(own, w, b, group=group, sizes=sizes),
        "column_parallel_linear": lambda: column_parallel_linear(x, w, b, group=group),
        "dropout": lambda: dropout(x, 0.5, seed=1),
        "linear_reduce_scatter": lambda: linear_reduce_scatter(
            wide, w, b, group=group, sizes=sizes
        ),
        "row_parallel_linear": lambda: row_parallel_linear(x, w, b, group=group),
    }


def public_faults(group: Group) -> list[str]:
    faults = []
    for choice in CHOICES:
        for name, function in public_functions(group).items():
            with backend.use(choice) if choice else nullcontext(), watched({}) as seen:
                try:
                    differentiate(function())
                except backend.UnsupportedError as error:
                    if choice is None or f"{choice}: " not in str(error):
                        faults.append(f"{name} on {choice}: {error}")
            allowed = {"cpu"} if choice is None else {choice}
            if others := seen.kernels - allowed:
                faults.append(f"{name} on {choice}: kernels of {sorted(others)} ran")
            group.communicator.barrier()
    return faults


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_public_function_runs_on_the_chosen_backend_or_says_why(ranks):
    """In backward too; its parts, where no kernel does it as one, are on that backend or none."""
    for faults in run_ranks(public_faults, ranks):
        assert not faults, "\n".join(faults)
