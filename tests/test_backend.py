"""The op x backend table: order, explicit choice, reasons."""

from __future__ import annotations

import pytest
import torch

import pyparallel.ops  # noqa: F401
from pyparallel import backend
from pyparallel.testing import normals


@pytest.fixture
def toy_op(monkeypatch):
    """An op on three backends; the first refuses odd numbers."""
    monkeypatch.setattr(backend, "_table", {})
    refuse_odd = lambda x: "x is odd" if x % 2 else None  # noqa: E731
    backend.register("toy", "triton", supports=refuse_odd)(lambda x: ("triton", x))
    backend.register("toy", "torch")(lambda x: ("torch", x))
    backend.register("toy", "reference")(lambda x: ("reference", x))
    monkeypatch.delenv("PYPARALLEL_BACKEND", raising=False)


def test_the_first_that_supports_the_call_runs_it(toy_op):
    assert backend.call("toy", 2) == ("triton", 2)
    assert backend.call("toy", 3) == ("torch", 3)
    assert backend.table() == {"toy": ["triton", "torch", "reference"]}


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
    backend._table["toy"].pop("torch")
    with pytest.raises(backend.UnsupportedError, match=r"triton: x is odd; .*torch: not impl"):
        backend.call("toy", 3)


def test_unknown_names_are_errors(toy_op, monkeypatch):
    with pytest.raises(ValueError, match=r"backend: expected one of cuda, .* got 'tpu'"):
        backend.use("tpu").__enter__()
    with pytest.raises(ValueError, match=r"backend: expected .* got 'tpu'"):
        backend.register("toy", "tpu")
    with pytest.raises(ValueError, match="op: expected one of toy, got 'tyo'"):
        backend.call("tyo", 1)
    monkeypatch.setenv("PYPARALLEL_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"backend: expected .* got 'tpu'"):
        backend.call("toy", 2)


# Fused ways of what callers can also do by other ops: asked for by backend.offered.
OFFERED = {
    "all_gather",
    "all_reduce",
    "all_reduce_residual_rms_norm",
    "gated_mlp",
    "reduce_scatter",
}


def test_every_op_has_a_library_path_and_a_reference():
    table = backend.table()
    assert {"linear", "attention", "rms_norm", "layer_norm", "rope", "activation"} <= table.keys()
    for op, names in table.items():
        if op in OFFERED:
            continue
        assert "reference" in names, op
        assert "torch" in names or "linear_all_reduce" in op, (op, names)


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
