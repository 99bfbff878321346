"""Soft-capping of logits by the rows that run here, checked against fp64 before it is timed.

    pytest --benchmark-enable bench/ops/softcap.py

T rows of Gemma 2's vocabulary, cut over 8 ranks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.rivals import machine
from pyparallel import backend
from pyparallel.ops.softcap import softcap

CAP = 30.0
SHAPE = (64, 256_000 // 8)
DEVICES = ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))


def running() -> list[tuple[str, str]]:
    """The backends that have a row for this op, with the devices on which it runs here."""
    return [
        (name, device)
        for name in backend.ORDER
        for device in DEVICES
        if (row := backend.row("softcap", name)) is not None
        and row.reason(torch.empty(1, device=device), CAP) is None
    ]


@pytest.mark.parametrize(("name", "device"), running())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softcap(benchmark: Any, name: str, device: str, dtype: torch.dtype) -> None:
    logits = torch.randn(SHAPE, dtype=dtype, device=device) * CAP
    truth = torch.tanh(logits.double() / CAP) * CAP

    def capped() -> torch.Tensor:
        with backend.use(name):
            y = softcap(logits, CAP)
        if device == "cuda":
            torch.cuda.synchronize()
        return y

    assert ((capped().double() - truth).abs() <= 2.0**-6 * CAP).all()
    benchmark(capped)
    benchmark.extra_info |= machine() | {
        "op": "softcap",
        "shape": list(SHAPE),
        "dtype": str(dtype),
        "world": 1,
        "backend": name,
        "device": device,
    }
