"""Dropout whose mask is a function of the element's place in the whole tensor.

    forward   y = x / (1 - p) where keep(seed, index), else 0
    backward  dx = dy / (1 - p) where keep(seed, index), else 0

``keep`` is a counter-based generator (:func:`pyparallel.reference.dropout_keep`) of the 64-bit seed and
the index ``((batch * S) + token) * H + feature`` in the whole [..., S, H]. So a shard's mask is the
shard of the mask: it does not depend on how many ranks there are, and nothing but the seed is kept for
backward.

Communication: none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel import backend, reference


def run_torch(x: Tensor, p: float, seed: Tensor, rows: int, row_start: int) -> Tensor:
    """The mask by torch's integer arithmetic, whole sequence by whole sequence. No autograd.

    Args:
        x: [..., S_r, H], the tokens from ``row_start`` on of sequences of ``rows`` tokens.
        seed: a CPU scalar, int64.
    """
    width = x.shape[-1]
    shard = (row_start + torch.arange(x.shape[-2], device=x.device)).unsqueeze(-1) * width
    shard = shard + torch.arange(width, device=x.device)
    flat = x.reshape(-1, *x.shape[-2:])
    y = torch.empty_like(flat)
    wide = flat.dtype if flat.dtype == torch.float64 else torch.float32
    for sequence in range(flat.shape[0]):
        keep = reference.dropout_keep(sequence * rows * width + shard, p, seed)
        # One rounding, of the fp32 product, as in the kernels.
        scaled = flat[sequence].to(wide) * (1.0 / (1.0 - p))
        y[sequence] = torch.where(keep, scaled, 0.0)
    return y.view(x.shape)


run_reference = run_torch


def _real(x: Tensor, p: float, seed: Tensor, rows: int, row_start: int) -> Tensor:
    return backend.call("dropout", x, p, seed, rows, row_start)


_library = torch.library.Library("pyparallel", "FRAGMENT")
_library.define("dropout(Tensor x, float p, Tensor seed, SymInt rows, SymInt row_start) -> Tensor")
_library.impl("dropout", _real, "CompositeExplicitAutograd")
torch.library.register_fake(
    "pyparallel::dropout",
    lambda x, p, seed, rows, row_start: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    lib=_library,
)


def _call(x: Tensor, p: float, seed: Tensor, rows: int, row_start: int) -> Tensor:
    """The table's, at once or as an operator of a graph that is being traced."""
    run = torch.ops.pyparallel.dropout if torch.compiler.is_compiling() else _real
    return run(x, p, seed, rows, row_start)


class _Dropout(Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float, seed: Tensor, rows: int, row_start: int) -> Tensor:
        ctx.mask = p, seed, rows, row_start
        return _call(x, *ctx.mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _call(grad, *ctx.mask), None, None, None, None


def dropout(
    x: Tensor,
    p: float,
    *,
    seed: int | Tensor,
    length: int | None = None,
    start: int = 0,
) -> Tensor:
    """Drop each element with probability ``p``, and scale those that stay by ``1 / (1 - p)``.

    Args:
        x: [..., S_r, H].
        seed: 64 bits, the same on all ranks and another one at every call; a number or a CPU scalar.
        length: S, by default S_r; start: the place in it of x's first token.

    Raises:
        ValueError: p is not in [0, 1], or the tokens do not lie within the length.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected 0 <= p <= 1, got {p}")
    rows = x.shape[-2] if length is None else length
    if not 0 <= start <= rows - x.shape[-2]:
        raise ValueError(
            f"x: its {x.shape[-2]} tokens from start={start} on do not lie within length={rows}"
        )
    if p == 0.0:
        return x
    if p == 1.0:
        return x * 0.0
    if not isinstance(seed, Tensor):
        # Python's numbers have no end; the generator's key is the lowest 64 bits.
        seed = torch.tensor((seed + (1 << 63)) % (1 << 64) - (1 << 63))
    return _Dropout.apply(x, p, seed, rows, start)
