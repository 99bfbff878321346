"""One op at sizes of one's own, by every backend that runs here, torch's among them.

    pytest --benchmark-enable bench/ops/own_shapes.py --op linear --shape 512x1536x576 --dtype bf16

Each is held against the fp64 reference before it is timed: it may be no farther from it than eight
times what torch's own row is, and a rounding. Without options: every op here at one shape, by which its
numbers can be read. Flops and bytes are in the JSON of `--benchmark-json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.rivals import machine
from pyparallel import backend
from pyparallel.testing import UNIT_ROUNDOFF

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Op:
    """How an op is called at given sizes.

    Attributes:
        sizes: what the numbers of a shape are, and one such shape.
        make: its tensors, drawn, and other arguments.
        flops: of one call.
    """

    sizes: str
    default: str
    make: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
    flops: Callable[..., float]


def _drawn(dtype: torch.dtype, *sizes: int) -> Tensor:
    generator = torch.Generator().manual_seed(prod(sizes))
    return torch.randn(sizes, generator=generator).to(DEVICE, dtype)


def _linear(dtype: torch.dtype, m: int, k: int, n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_drawn(dtype, m, k), _drawn(dtype, n, k) / k**0.5, None), {}


def _attention(
    dtype: torch.dtype, batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    q = _drawn(dtype, batch, tokens, heads, head_dim)
    k, v = (_drawn(dtype, batch, tokens, kv_heads, head_dim) for _ in range(2))
    return (q, k, v), {"causal": True}


OPS = {
    "linear": Op("MxKxN", "512x1536x576", _linear, lambda m, k, n: 2.0 * m * k * n),
    "attention": Op(
        "batch x tokens x heads x KV heads x head_dim, causal",
        "1x512x9x3x64",
        _attention,
        lambda b, s, n, g, d: 2.0 * b * s * s * n * d,
    ),
    "rms_norm": Op(
        "rows x features",
        "512x576",
        lambda dtype, t, h: ((_drawn(dtype, t, h), _drawn(dtype, h), 1e-6), {}),
        lambda t, h: 4.0 * t * h,
    ),
    "layer_norm": Op(
        "rows x features",
        "512x576",
        lambda dtype, t, h: (
            (_drawn(dtype, t, h), _drawn(dtype, h), _drawn(dtype, h), 1e-5),
            {},
        ),
        lambda t, h: 7.0 * t * h,
    ),
    "gated_activation": Op(
        "rows x features of the gate",
        "512x1536",
        lambda dtype, t, f: ((_drawn(dtype, t, 2 * f), "silu"), {}),
        lambda t, f: 6.0 * t * f,
    ),
    "softcap": Op(
        "rows x vocabulary",
        "64x32000",
        lambda dtype, t, v: ((30 * _drawn(dtype, t, v), 30.0), {}),
        lambda t, v: 3.0 * t * v,
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What was asked for; without, every op at one shape."""
    asked = metafunc.config.getoption
    cases = []
    for name in asked("--op") or OPS:
        if name not in OPS:
            raise pytest.UsageError(f"--op: expected one of {', '.join(OPS)}, got {name!r}")
        for shape in asked("--shape") or [OPS[name].default]:
            for dtype in asked("--dtype") or ["fp32", "bf16"]:
                if dtype not in DTYPES:
                    raise pytest.UsageError(
                        f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}"
                    )
                call = _made(name, shape, dtype)
                for row in backend.ORDER:
                    if row != "reference" and _runs(name, row, *call):
                        cases.append(pytest.param(name, shape, dtype, row, *call, id=row))
    metafunc.parametrize(("op", "shape", "dtype", "row", "args", "options"), cases)


def _made(name: str, shape: str, dtype: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        return OPS[name].make(DTYPES[dtype], *(int(size) for size in shape.split("x")))
    except (TypeError, ValueError, RuntimeError) as error:
        op = OPS[name]
        raise pytest.UsageError(
            f"--shape: expected {op.sizes} for {name}, such as {op.default}, got {shape!r} ({error})"
        ) from None


def _runs(name: str, row: str, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    found = backend.row(name, row)
    return found is not None and found.reason(*args, **options) is None


def test_op(
    benchmark: Any,
    op: str,
    shape: str,
    dtype: str,
    row: str,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    def on(name: str) -> Callable[..., Tensor]:
        with backend.use(name):
            return backend.select(op, *args, **options)

    run = on(row)

    def call() -> Tensor:
        with torch.no_grad():
            y = run(*args, **options)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return y

    wide = (value.double() if isinstance(value, Tensor) else value for value in args)
    truth = on("reference")(*wide, **options).double()
    plain = on("torch")(*args, **options).double()
    allowed = 8 * (plain - truth).abs().max() + UNIT_ROUNDOFF[DTYPES[dtype]] * truth.abs().max()
    assert (call().double() - truth).abs().max() <= allowed, f"{op} {shape} {dtype} on {row}"
    benchmark.group = f"{op} {shape} {dtype}"
    benchmark(call)
    tensors = [*(value for value in args if isinstance(value, Tensor)), truth.to(DTYPES[dtype])]
    benchmark.extra_info |= machine() | {
        "op": op,
        "shape": shape,
        "dtype": dtype,
        "backend": row,
        "device": DEVICE,
        "flops": OPS[op].flops(*(int(size) for size in shape.split("x"))),
        "bytes": sum(tensor.numel() * tensor.itemsize for tensor in tensors),
    }
