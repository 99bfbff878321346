"""Of `bench.kernels.gpu_kernels`: what works row by row, norms, activations, rope and cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.gpu_cases import Case, backward, plain
from pyparallel.kernels.elementwise.gated_activation import gated_activation
from pyparallel.kernels.elementwise.rope import rope
from pyparallel.kernels.loss.cross_entropy import (
    cross_entropy_backward_,
    cross_entropy_combine,
    cross_entropy_statistics,
)
from pyparallel.kernels.norm.norm import layer_norm, rms_norm
from pyparallel.kernels.norm.norm_backward import norm_backward
from pyparallel.native.cuda import extension as cuda_extension

EPS = 1e-5


@lru_cache(maxsize=1)
def cuda_ops() -> ModuleType:
    reasons = cuda_extension.missing()
    if reasons:
        raise RuntimeError(f"extension not built: {reasons[0]}")
    from pyparallel.native.cuda import ops as cuda_ops

    return cuda_ops


def row_cases(sizes: dict[str, Any], randn: Callable[..., Tensor]) -> Iterator[Case]:
    m, h = sizes["norm"]

    def torch_rms(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (h,), w, EPS)

    def torch_add(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return torch_rms(total, w), total

    def torch_layer(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (h,), w, bias, EPS)

    def triton_backward(dy: Tensor, x: Tensor, w: Tensor) -> Callable[[], Any]:
        rstd = rms_norm(x, w, eps=EPS).rstd
        return lambda: norm_backward(dy, x, w, None, rstd)[::2]  # dx, dweight

    def norm(name: str, inputs: Any, ours: Any, torchs: Any, passes: int, **more: Any) -> Case:
        def truth(*args: Tensor) -> Any:
            return torchs(*(x.float() for x in args))()

        flops, num_bytes = 4 * m * h, 2 * passes * m * h
        return Case(
            f"{name} {m}x{h}", inputs, truth, ours, {"torch": torchs}, flops, num_bytes, **more
        )

    yield norm(
        "rms_norm",
        lambda: (randn(m, h), randn(h)),
        {
            "cuda": plain(lambda x, w: cuda_ops().rms_norm(x, w, eps=EPS)),
            "triton": plain(lambda x, w: rms_norm(x, w, eps=EPS).out),
        },
        plain(torch_rms),
        2,
    )
    yield norm(
        "add_rms_norm",
        lambda: (randn(m, h), randn(m, h), randn(h)),
        {
            "cuda": plain(lambda x, r, w: cuda_ops().add_rms_norm(x, r, w, eps=EPS)),
            "triton": plain(lambda x, r, w: rms_norm(x, w, eps=EPS, residual=r)[:2]),
        },
        plain(torch_add),
        4,
        roundings=2,
    )
    yield norm(
        "layer_norm",
        lambda: (randn(m, h), randn(h), randn(h)),
        {
            "cuda": plain(lambda x, w, b: cuda_ops().layer_norm(x, w, b, eps=EPS)),
            "triton": plain(lambda x, w, b: layer_norm(x, w, b, eps=EPS).out),
        },
        plain(torch_layer),
        2,
    )
    yield norm(
        "rms_norm_backward",
        lambda: (randn(m, h), randn(m, h), randn(h)),
        {
            "cuda": backward(lambda x, w: cuda_ops().rms_norm(x, w, eps=EPS)),
            "triton": triton_backward,
        },
        backward(torch_rms),
        3,
    )
    m, f = sizes["gated_activation"]
    yield Case(
        f"gated_activation {m}x{f}",
        lambda: (randn(m, f), randn(m, f)),
        lambda g, u: F.silu(g.float()) * u.float(),
        {
            "cuda": plain(lambda g, u: cuda_ops().gated_activation(g, u, activation="silu")),
            "triton": plain(partial(gated_activation, activation="silu")),
        },
        {"torch": plain(lambda g, u: F.silu(g) * u)},
        8 * m * f,
        6 * m * f,
    )
    b, s, n, d = sizes["rope"]

    def rope_inputs() -> tuple[Tensor, ...]:
        x = randn(b, s, n, d)
        steps = torch.arange(d // 2, device=x.device) * (2 / d)
        angles = torch.arange(s, device=x.device)[:, None] * 500000.0**-steps
        return x, angles.cos().bfloat16(), angles.sin().bfloat16()

    def hugging_face(x: Tensor, cos: Tensor, sin: Tensor) -> Callable[[], Tensor]:
        cos, sin = (torch.cat((a, a), -1)[None, :, None] for a in (cos, sin))

        def run() -> Tensor:
            one, two = x.chunk(2, -1)
            return x * cos + torch.cat((-two, one), -1) * sin

        return run

    yield Case(
        f"rope {b}x{s}x{n}x{d}",
        rope_inputs,
        lambda *inputs: hugging_face(*(x.float() for x in inputs))(),
        {"triton": plain(rope)},
        {"hugging face": hugging_face},
        3 * b * s * n * d,
        4 * b * s * n * d,
    )


def loss_cases(sizes: dict[str, Any], randn: Callable[..., Tensor]) -> Iterator[Case]:
    m, vocab = sizes["cross_entropy"]

    def inputs() -> tuple[Tensor, Tensor]:
        logits = randn(m, vocab)
        return logits, torch.randint(vocab, (m,), device=logits.device)

    def in_place(run: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
        # The first call, which is checked, sees the logits; those that are timed their gradients.
        def setup(logits: Tensor, targets: Tensor) -> Callable[[], Any]:
            dloss = torch.full((m,), 1 / m, device=logits.device)
            return partial(run, logits.clone(), targets, dloss)

        return setup

    def by_cuda(logits: Tensor, targets: Tensor, dloss: Tensor) -> tuple[Tensor, Tensor]:
        ops, same = cuda_ops(), {"start": 0, "ignored": -100}
        stats = ops.cross_entropy_statistics(logits, targets, **same)
        lse = stats[:, 0] + stats[:, 1].log()
        ops.cross_entropy_gradient_(logits, targets, lse, dloss, vocab=vocab, **same)
        return lse - stats[:, 2], logits

    def by_triton(logits: Tensor, targets: Tensor, dloss: Tensor) -> tuple[Tensor, Tensor]:
        stats = cross_entropy_statistics(logits, targets)
        loss, lse = cross_entropy_combine(stats[None], targets, vocab_size=vocab)
        return loss, cross_entropy_backward_(logits, targets, lse, dloss, vocab_size=vocab)

    def by_torch(logits: Tensor, targets: Tensor) -> Callable[[], Any]:
        leaf = logits.detach().requires_grad_()

        def run() -> tuple[Tensor, Tensor]:
            loss = F.cross_entropy(leaf, targets)
            return loss, torch.autograd.grad(loss, leaf)[0]

        return run

    def apart(result: tuple[Tensor, Tensor], _: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        # The target's own element would hide all others of its row.
        loss, grad = result[0].mean(), result[1]
        place = targets[:, None]
        return loss.detach(), grad.gather(1, place)[:, 0], grad.scatter(1, place, 0)

    yield Case(
        f"cross_entropy {m}x{vocab}",
        inputs,
        lambda logits, targets: by_torch(logits.float(), targets)(),
        {"cuda": in_place(by_cuda), "triton": in_place(by_triton)},
        {"torch": by_torch},
        8 * m * vocab,
        6 * m * vocab,
        view=apart,
    )
