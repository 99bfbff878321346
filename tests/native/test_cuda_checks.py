"""Arguments of the CUDA ops that do not fit: a ValueError of one line, before any kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pyparallel.native.cuda import extension as cuda_extension

pytestmark = pytest.mark.skipif(
    not cuda_extension.is_built(), reason="the CUDA extension is not built: run `make cuda`"
)

M, H = 4, 8


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


X, ROW, ROWS = meta(M, H), meta(H), meta(M)
TARGETS = meta(M, dtype=torch.int64)
CASES: dict[str, tuple[Callable, str]] = {
    "vector": (lambda o: o.rms_norm(ROW, ROW, eps=1e-5), "x: expected a matrix"),
    "strides": (lambda o: o.rms_norm(meta(H, M).t(), ROW, eps=1e-5), "x: expected a contiguous"),
    "weight": (
        lambda o: o.rms_norm(X, meta(H + 1), eps=1e-5),
        r"weight: expected a contiguous \[8\]",
    ),
    "dtype": (lambda o: o.rms_norm(X, ROW.half(), eps=1e-5), "weight: expected torch.float32"),
    "integers": (
        lambda o: o.rms_norm(X.long(), ROW.long(), eps=1e-5),
        "x: expected float32, float16",
    ),
    "residual": (
        lambda o: o.add_rms_norm(X, meta(M + 1, H), ROW, eps=1e-5),
        r"residual: expected \[4, 8\], got \[5, 8\]",
    ),
    "backward": (
        lambda o: o.rms_norm_backward(meta(M, H + 1), X, ROW, eps=1e-5),
        r"dy: expected \[4, 8\], got \[4, 9\]",
    ),
    "bias": (lambda o: o.layer_norm(X, ROW, ROWS, eps=1e-5), r"bias: expected a contiguous \[8\]"),
    "activation": (
        lambda o: o.bias_activation(X, None, activation="swish"),
        "activation: expected one of",
    ),
    "bias dtype": (
        lambda o: o.bias_activation(X, ROW.half(), activation="relu"),
        "bias: expected torch.float32, got torch.float16",
    ),
    "gate": (
        lambda o: o.gated_activation(X, meta(M, 2 * H)[:, :H], activation="silu"),
        "up: expected the row stride of gate, 8, got 16",
    ),
    "parts": (lambda o: o.rank_sum(X, X), r"parts: expected \[R, M, N\]"),
    "parts' strides": (lambda o: o.rank_sum(meta(2, H, M).mT, X), "parts: expected a contiguous"),
    "out": (lambda o: o.rank_sum(meta(2, M, H), meta(M, 1)), r"out: expected \[4, 8\]"),
    "targets": (
        lambda o: o.cross_entropy_statistics(X, ROW.long(), start=0, ignored=-100),
        r"targets: expected a contiguous \[4\]",
    ),
    "target dtype": (
        lambda o: o.cross_entropy_statistics(X, TARGETS.int(), start=0, ignored=-100),
        "targets: expected torch.int64",
    ),
    "lse": (
        lambda o: o.cross_entropy_gradient_(
            X, TARGETS, ROWS.half(), ROWS, start=0, vocab=H, ignored=-100
        ),
        "lse: expected torch.float32",
    ),
    "device": (
        lambda o: o.rms_norm(torch.zeros(M, H), torch.zeros(H), eps=1e-5),
        "x: expected a tensor on a GPU, got one on cpu",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_with_a_way_out(name: str) -> None:
    from pyparallel.native.cuda import ops as cuda_ops

    call, message = CASES[name]
    with pytest.raises(ValueError, match=message) as caught:
        call(cuda_ops)
    text = str(caught.value)
    assert "\n" not in text and (name == "activation" or "; " in text)
