"""What gpu_kernels.py times: a case with its inputs, truth and contenders; matmul and attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyparallel.kernels.attention.attention import attention
from pyparallel.kernels.attention.attention_backward import attention_backward
from pyparallel.kernels.attention.attention_decode import attention_decode
from pyparallel.kernels.matmul.gated_mlp import gated_mlp
from pyparallel.kernels.matmul.gated_mlp_descriptor import gated_mlp_on_best_path
from pyparallel.kernels.matmul.matmul import matmul
from pyparallel.kernels.matmul.matmul_descriptor import matmul_descriptor, matmul_on_best_path

BACKENDS = {"sdpa": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# attention: B, S, N, G, D; decode: B, T, N, G, D; rope: B, S, N, D; loss: T, V; limits: matmul, copy.
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "matmul": [
            (m, n, k)
            for n, k in ((4096, 4096), (14336, 4096), (3584, 8192))
            for m in (1, 16, 128, 4096)
        ],
        "gated_mlp": [(m, 14336, 4096) for m in (16, 4096)],
        "attention": (2, 4096, 32, 8, 128),
        "attention_decode": (8, 8192, 32, 8, 128),
        "norm": (8192, 8192),
        "gated_activation": (8192, 14336),
        "cross_entropy": (4096, 128256),
        "rope": (2, 4096, 32, 128),
        "limits": (8192, 2**30),
    },
    "tiny": {
        "matmul": [(m, 64, 96) for m in (1, 16, 40)],
        "gated_mlp": [(m, 64, 96) for m in (16, 40)],
        "attention": (1, 48, 4, 2, 16),
        "attention_decode": (2, 80, 4, 2, 16),
        "norm": (32, 64),
        "gated_activation": (16, 96),
        "cross_entropy": (8, 300),
        "rope": (1, 8, 4, 16),
        "limits": (128, 2**16),
    },
}


@dataclass(frozen=True)
class Case:
    """ours and rivals: name -> setup, where setup(*inputs) gives the call that is timed.

    A row of a result may be off by `roundings` roundings to bf16, 2^-8 of its norm each; `share` of
    the rows must keep to it. `view` brings results and truth into rows that can be compared so.
    """

    name: str
    inputs: Callable[[], tuple[Tensor, ...]]
    truth: Callable[..., Any]
    ours: dict[str, Callable[..., Callable[[], Any]]]
    rivals: dict[str, Callable[..., Callable[[], Any]]]
    flops: float
    num_bytes: float
    roundings: int = 1
    share: float = 1.0
    view: Callable[..., Any] = field(default=lambda result, *inputs: result)


def plain(run: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    return lambda *inputs: partial(run, *inputs)


def backward(run: Callable[..., Tensor]) -> Callable[..., Callable[[], Any]]:
    """Inputs are the output's gradient, then the leaves; the forward pass is not timed."""

    def setup(grad: Tensor, *inputs: Tensor) -> Callable[[], Any]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return partial(torch.autograd.grad, run(*leaves), leaves, grad, retain_graph=True)

    return setup


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, kind: SDPBackend | None) -> Tensor:
    """q [B, S, N, D], k and v [B, T, G, D], as ours takes them."""
    run = partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=True)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if kind is None:
        return run(*heads_first).transpose(1, 2)
    with sdpa_kernel(kind):
        return run(*heads_first).transpose(1, 2)


def attention_truth(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:
    """o, or the gradients of q, k and v: fp32, causal, one key head of one sequence at a time."""
    group, (s, t) = q.shape[2] // k.shape[2], (q.shape[1], k.shape[1])
    hidden = torch.ones(s, t, dtype=torch.bool, device=q.device).triu(1 + t - s)
    outs = [torch.empty_like(x, dtype=torch.float32) for x in ((q,) if do is None else (q, k, v))]
    for b, g in ((b, g) for b in range(q.shape[0]) for g in range(k.shape[2])):
        heads = slice(g * group, (g + 1) * group)
        leaves = (q[b, :, heads].float().transpose(0, 1), k[b, :, g].float(), v[b, :, g].float())
        for leaf in leaves:
            leaf.requires_grad_(do is not None)
        scores = leaves[0] @ leaves[1].T / math.sqrt(q.shape[3])
        o = scores.masked_fill(hidden, -math.inf).softmax(-1) @ leaves[2]
        if do is None:
            outs[0][b, :, heads] = o.transpose(0, 1)
            continue
        dq, dk, dv = torch.autograd.grad(o, leaves, do[b, :, heads].float().transpose(0, 1))
        outs[0][b, :, heads], outs[1][b, :, g], outs[2][b, :, g] = dq.transpose(0, 1), dk, dv
    return outs[0] if do is None else tuple(outs)


def matmul_cases(sizes: dict[str, Any], randn: Callable[..., Tensor]) -> Iterator[Case]:
    for m, n, k in sizes["matmul"]:
        yield Case(
            f"matmul {m}x{n}x{k}",
            lambda m=m, n=n, k=k: (randn(m, k), randn(n, k)),
            lambda x, w: x.float() @ w.float().T,
            {
                "pointers": plain(matmul),
                "descriptors": plain(matmul_descriptor),
                "chosen": plain(matmul_on_best_path),
            },
            {"cublas": plain(F.linear)},
            2 * m * n * k,
            2 * (m * k + n * k + m * n),
        )
    silu, best = (partial(f, activation="silu") for f in (gated_mlp, gated_mlp_on_best_path))
    for m, f, k in sizes["gated_mlp"]:

        def unfused(x: Tensor, w: Tensor) -> Tensor:
            gate, up = F.linear(x, w).chunk(2, -1)
            return F.silu(gate) * up

        yield Case(
            f"gated_mlp {m}x{f}x{k}",
            lambda m=m, f=f, k=k: (randn(m, k), randn(2 * f, k) / math.sqrt(k)),
            lambda x, w, unfused=unfused: unfused(x.float(), w.float()),
            {"pointers": plain(silu), "chosen": plain(best)},
            {"cublas+silu": plain(unfused)},
            4 * m * f * k,
            2 * (2 * f * k + m * k + m * f),
            roundings=3,
        )


def attention_cases(sizes: dict[str, Any], randn: Callable[..., Tensor]) -> Iterator[Case]:
    b, s, n, g, d = sizes["attention"]
    flops, num_bytes = 2 * b * n * s * s * d, 4 * b * s * (n + g) * d
    shape = f"{b}x{s}x{n}/{g}x{d}"
    causal = {name: partial(sdpa, causal=True, kind=kind) for name, kind in BACKENDS.items()}
    yield Case(
        f"attention {shape}",
        lambda: (randn(b, s, n, d), randn(b, s, g, d), randn(b, s, g, d)),
        attention_truth,
        {"triton": plain(lambda q, k, v: attention(q, k, v, causal=True)[0])},
        {name: plain(run) for name, run in causal.items()},
        flops,
        num_bytes,
        roundings=2,
    )

    def ours_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
        o, lse = attention(q, k, v, causal=True)
        return partial(attention_backward, do, q, k, v, o, lse, causal=True)

    # The first query's gradient is zero but for rounding, so that a few rows have no small error.
    yield Case(
        f"attention_backward {shape}",
        lambda: (randn(b, s, n, d), randn(b, s, n, d), randn(b, s, g, d), randn(b, s, g, d)),
        lambda do, q, k, v: attention_truth(q, k, v, do),
        {"triton": ours_backward},
        {name: backward(run) for name, run in causal.items()},
        2.5 * flops,
        2 * num_bytes,
        roundings=3,
        share=0.95,
    )
    b, t, n, g, d = sizes["attention_decode"]

    def decode_inputs() -> tuple[Tensor, ...]:
        q = randn(b, n, d)
        lengths = torch.full((b,), t, dtype=torch.int32, device=q.device)
        return q, randn(b, t, g, d), randn(b, t, g, d), lengths

    def one_query(q: Tensor, k: Tensor, v: Tensor, _: Tensor, *, kind: Any) -> Tensor:
        return sdpa(q[:, None], k, v, causal=False, kind=kind)[:, 0]

    yield Case(
        f"attention_decode {b}x{t}x{n}/{g}x{d}",
        decode_inputs,
        lambda q, k, v, _: attention_truth(q[:, None], k, v)[:, 0],
        {"triton": plain(lambda *inputs: attention_decode(*inputs)[0])},
        {name: plain(partial(one_query, kind=kind)) for name, kind in BACKENDS.items()},
        4 * b * n * t * d,
        4 * b * t * g * d,
        roundings=2,
    )
