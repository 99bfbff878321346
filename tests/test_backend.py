"""The op x backend table: order, explicit choice, reasons."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyparallel import backend
from pyparallel.testing import normals

ODD = """
def reason(x):
    return "x is odd" if x % 2 else None

def run(x):
    return "triton", x
"""
OWN = """
def run_torch(x):
    return "torch", x

def run_reference(x):
    return "reference", x
"""
# A file of a root of rows, and what is in it.
FILES = {
    "__init__": "",
    "toy": OWN,
    "triton/__init__": "def reason(x, asked):\n    return 'x is huge' if x > 1000 else None\n",
    "triton/toy": ODD,
    "triton/_shared": "",
    "cuda/__init__": "def reason(x, asked):\n    return None\n",
    "cuda/broken": "import no_such_package\n",
    "cpu/__init__": "def reason(x, asked):\n    return None\n",
}


def write_rows(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def toy_op(monkeypatch, tmp_path):
    """An op on three backends, found by its files; the first refuses odd numbers."""
    write_rows(tmp_path / "toy_rows", FILES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backend, "ROOTS", ("toy_rows",))
    rows = {name: SimpleNamespace() for name in ("automatic", *backend.BACKENDS)}
    monkeypatch.setattr(backend, "_rows", SimpleNamespace(**rows))
    backend._row.cache_clear()
    monkeypatch.delenv("PYPARALLEL_BACKEND", raising=False)
    yield tmp_path / "toy_rows"
    backend._row.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_rows"]:
        del sys.modules[name]


def test_the_first_that_supports_the_call_runs_it(toy_op):
    assert backend.call("toy", 2) == ("triton", 2)
    assert backend.call("toy", 3) == ("torch", 3)
    assert backend.table() == {"broken": ["cuda"], "toy": ["triton", "torch", "reference"]}


def test_an_explicit_choice_runs_or_raises_with_the_reason(toy_op, monkeypatch):
    with backend.use("reference"):
        assert backend.call("toy", 2) == ("reference", 2)
        with backend.use("triton"):
            assert backend.chosen() == "triton"
            with pytest.raises(backend.UnsupportedError, match=r"toy: .*\(triton: x is odd\)"):
                backend.call("toy", 3)
        assert backend.chosen() == "reference"
    with backend.use("cuda"), pytest.raises(ValueError, match=r"\(cuda: not implemented\)"):
        backend.call("toy", 2)
    monkeypatch.setenv("PYPARALLEL_BACKEND", "torch")
    assert backend.call("toy", 2) == ("torch", 2)
    with backend.use("triton"):
        assert backend.call("toy", 2) == ("triton", 2)


def test_the_choice_ends_with_its_block_even_by_an_error(toy_op):
    with pytest.raises(KeyError), backend.use("torch"):
        raise KeyError
    assert backend.chosen() is None


def test_the_reference_is_never_fallen_back_to(toy_op):
    write_rows(toy_op, {"toy": OWN.replace("run_torch", "other")})
    with pytest.raises(backend.UnsupportedError, match=r"triton: x is odd; .*torch: not impl"):
        backend.call("toy", 3)


def test_a_folder_refuses_before_a_file_is_read(toy_op):
    with backend.use("triton"), pytest.raises(backend.UnsupportedError, match="x is huge"):
        backend.call("toy", 1002)
    assert "toy_rows.triton.toy" not in sys.modules
    with backend.use("triton"):
        backend.call("toy", 2)
    assert "toy_rows.triton.toy" in sys.modules


def test_a_file_that_does_not_import_is_a_reason(toy_op):
    with pytest.raises(backend.UnsupportedError, match=r"cuda: .*broken can't .*no_such_package"):
        backend.call("broken", 1)
    assert backend.offered("broken", 1) is None


def test_a_fused_op_is_composed_where_no_row_takes_it(toy_op):
    parts = lambda x: ("parts", backend.call("toy", x)[0])  # noqa: E731
    assert backend.compose("toy", parts, 2) == ("triton", 2)
    assert backend.compose("broken", parts, 3) == ("parts", "torch")
    with backend.use("triton"):
        assert backend.compose("broken", parts, 2) == ("parts", "triton")
        with pytest.raises(
            backend.UnsupportedError,
            match=r"broken: not as one \(triton: not impl.*\), nor by its parts: toy: .*x is odd",
        ):
            backend.compose("broken", parts, 3)


def test_unknown_names_are_errors(toy_op, monkeypatch):
    with pytest.raises(ValueError, match=r"backend: expected one of cuda, .* got 'tpu'"):
        backend.use("tpu").__enter__()
    with pytest.raises(ValueError, match=r"backend: expected .* got 'tpu'"):
        backend.row("toy", "tpu")
    for name in ("tyo", "_shared"):
        with pytest.raises(ValueError, match=f"op: expected one of broken, toy, got '{name}'"):
            backend.call(name, 1)
    monkeypatch.setenv("PYPARALLEL_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"backend: expected .* got 'tpu'"):
        backend.call("toy", 2)


# Fused ways of what callers can also do by other ops: asked for by backend.offered.
OFFERED = {
    "all_gather",
    "all_gather_linear",
    "all_gather_linear_backward",
    "all_reduce",
    "all_reduce_residual_rms_norm",
    "column_parallel_linear_backward",
    "gated_mlp",
    "linear_all_reduce",
    "linear_reduce_scatter",
    "linear_reduce_scatter_backward",
    "reduce_scatter",
}


def test_every_op_has_a_library_path_and_a_reference():
    table = backend.table()
    assert {"linear", "attention", "rms_norm", "layer_norm", "rope", "activation"} <= table.keys()
    for op, names in table.items():
        if op in OFFERED:
            assert not {"torch", "reference"} & set(names), op
        else:
            assert {"torch", "reference"} <= set(names), (op, names)


@pytest.mark.parametrize("op", ["attention", "causal", "window", "mask", "prefix"])
def test_torch_attention_equals_the_reference(op):
    num_queries = 3 if op == "prefix" else 6
    q, k, v = (
        normals(2, n, h, 8, seed=s) for s, (n, h) in enumerate([(num_queries, 6), (6, 2), (6, 2)])
    )
    options = {"causal": op in ("causal", "window", "prefix")}
    if op == "window":
        options["window"] = 2
    if op == "mask":
        options["mask"] = torch.ones(2, 1, 6, 6, dtype=torch.bool)
        # A query that sees nothing gives zeros.
        options["mask"][1, 0, 4] = False
    results = []
    for name in ("torch", "reference"):
        with backend.use(name):
            results.append(backend.call("attention", q, k, v, **options))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    if op == "mask":
        assert not results[0][1, 4].any()
