"""Attention with its log-sum-exp on every backend: the equations, parts that add up, nothing seen."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from pyparallel import backend, reference
from pyparallel.ops.context.merge_attention import merge_all, merge_attention_
from pyparallel.testing import assert_equal, assert_within, normals
from tests.bounds import attention_bounds

# (B, S, T, N, G, D): square, longer keys, one query, grouped, one KV head, an odd head size.
SHAPES = ((2, 9, 9, 4, 4, 8), (1, 5, 11, 6, 2, 16), (2, 1, 7, 4, 1, 8), (1, 13, 13, 3, 3, 5))
PARTS = ("o", "lse", "dq", "dk", "dv")
OPTIONS = ({}, {"causal": True}, {"causal": True, "window": 3}, {"scale": 0.3}, {"mask": True})


def inputs(shape, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    batch, num_queries, num_keys, heads, kv_heads, size = shape
    sizes = [(num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads), (num_queries, heads)]
    return [
        normals(batch, tokens, count, size, seed=seed, dtype=dtype)
        for seed, (tokens, count) in enumerate(sizes)
    ]


def with_mask(options: dict, shape) -> dict:
    if not options.get("mask"):
        return options
    mask = normals(shape[0], 1, shape[1], shape[2], seed=9) > -0.5
    # A query that sees nothing, and one that sees one key.
    mask[:, :, 0] = False
    mask[:, :, -1] = False
    mask[:, :, -1, -1] = True
    return {**options, "mask": mask}


def everything(name: str | None, q, k, v, do, options: dict) -> list[torch.Tensor]:
    def call(op: str, *args):
        if name is None:
            return backend.call(op, *args, **options)
        with backend.use(name):
            return backend.call(op, *args, **options)

    o, lse = call("attention_with_lse", q, k, v)
    return [o, lse, *call("attention_with_lse_backward", q, k, v, o, lse, do)]


def truth(q, k, v, do, options: dict) -> list[torch.Tensor]:
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    o, lse = reference.attention(*wide, **options)
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, wide, do.double())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["torch", "reference"])
def test_forward_and_backward_are_the_equations(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for listed in OPTIONS:
            options = with_mask(listed, shape)
            q, k, v, do = inputs(shape, dtype)
            expected = truth(q, k, v, do, options)
            bounds = attention_bounds(q, k, v, do, **options)
            results = everything(name, q, k, v, do, options)
            assert results[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            unseen = expected[1] == -math.inf
            assert torch.equal(results[1] == -math.inf, unseen)
            results[1], expected[1] = (
                t.masked_fill(unseen, 0.0) for t in (results[1], expected[1])
            )
            for part, *compared in zip(PARTS, results, expected, bounds, strict=True):
                assert_within(*compared, f"{name} {dtype} {shape} {listed} {part}")


def test_gradients_over_parts_of_the_keys_add_up() -> None:
    q, k, v, do = inputs((2, 6, 10, 4, 2, 8), torch.float64)
    whole = everything("torch", q, k, v, do, {})
    parts = [
        everything("torch", q, k[:, part], v[:, part], do, {})
        for part in (slice(0, 3), slice(3, 10))
    ]
    o, lse = merge_all([part[0] for part in parts], [part[1] for part in parts])
    torch.testing.assert_close(o, whole[0])
    torch.testing.assert_close(lse, whole[1])
    dq = torch.zeros_like(q)
    for part in (slice(0, 3), slice(3, 10)):
        got = backend.call("attention_with_lse_backward", q, k[:, part], v[:, part], o, lse, do)
        dq += got[0]
        torch.testing.assert_close(got[1], whole[3][:, part])
        torch.testing.assert_close(got[2], whole[4][:, part])
    torch.testing.assert_close(dq, whole[2])


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (0, 0)])
def test_no_queries_or_no_keys(sizes) -> None:
    q, k, v, do = inputs((2, *sizes, 4, 2, 8))
    o, lse, *gradients = everything(None, q, k, v, do, {})
    assert o.shape == q.shape and not o.any()
    assert lse.shape == (2, 4, sizes[0]) and (lse == -math.inf).all()
    for gradient, tensor in zip(gradients, (q, k, v), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


def test_merging_nothing_changes_no_bit() -> None:
    o, lse = normals(2, 3, 4, 5, seed=1), normals(2, 4, 3, seed=2)
    lse[0, 0, 0], o[0, 0, 0] = -math.inf, 0.0
    before = o.clone(), lse.clone()
    merge_attention_(o, lse, torch.zeros_like(o), torch.full_like(lse, -math.inf))
    assert_equal(o, before[0], "o")
    assert_equal(lse, before[1], "lse")
    empty = torch.zeros_like(o), torch.full_like(lse, -math.inf)
    merge_attention_(*empty, o, lse)
    assert_equal(empty[0], before[0], "o into nothing")


def test_the_triton_kernel_gives_the_same() -> None:
    # Triton's interpreter is chosen when triton is first imported: in a process of its own.
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from tests.ops import test_attention_with_lse as t; t.in_interpreter()",
        ],
        env={**os.environ, "PYPARALLEL_BACKEND": "triton"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == "compared 20\n"


def in_interpreter() -> None:
    compared = 0
    for shape in SHAPES[:2]:
        for options in OPTIONS[:2]:
            q, k, v, do = inputs(shape)
            names = ["o", "lse", "dq", "dk", "dv"]
            for name, ours, theirs in zip(
                names,
                everything(None, q, k, v, do, options),
                everything("reference", q, k, v, do, options),
                strict=True,
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
                compared += 1
    mask = torch.ones(1, 1, 1, 1)
    reasons = backend.row("attention_with_lse", "triton").reason
    assert reasons(q, k, v) is None and reasons(q, k, v, mask=mask.bool()) is None
    assert "boolean" in reasons(q, k, v, mask=mask)
    assert "fp64" in reasons(q.double(), k, v)
    print("compared", compared)


def test_triton_is_not_taken_where_nobody_asked() -> None:
    q, k, _, _ = inputs(SHAPES[0])
    reason = backend.row("attention_with_lse", "triton").reason(q, k)
    assert "interpreter" in reason
