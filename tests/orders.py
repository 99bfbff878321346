"""A dense computation in several legal orders: how far rounding alone may take it from the truth.

What a dense model errs by in one run is one draw: the library's blocking on one processor, which may be
lucky. A bound has to hold for every order in which the same sums may be taken, so it is measured over
several of them: :func:`farthest` runs the computation as it comes, over two threads, and with every
summed dimension permuted, rows split; and keeps of every element what lies farthest from the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

Results = TypeVar("Results")
aten = torch.ops.aten
# Permutations tried, beside the order as it comes and the one of two threads.
ORDERS = 3


def farthest(run: Callable[[], Results], truth: Results, *, orders: int = ORDERS) -> Results:
    """``run()`` in several orders: of every element the value farthest from ``truth``'s.

    Args:
        run: computes a tensor, or a dict, list or tuple of tensors, the same at every call but for the
            order of its sums; its backward included, if it calls it.
        truth: the same structure in fp64.
        orders: how many random orders besides.

    Returns:
        The structure of ``run()``. What is no floating-point tensor is the plain run's.
    """
    exact, _ = tree_flatten(truth)
    with _threads(1):
        found, structure = tree_flatten(run())
        others = [tree_flatten(each)[0] for each in _others(run, orders)]
    for number, plain in enumerate(found):
        if not isinstance(plain, Tensor) or not plain.is_floating_point():
            continue
        for other in others:
            off, worst = (
                t.detach().double() - exact[number] for t in (other[number], found[number])
            )
            # Equal infinities differ by NaN, which is no distance.
            further = off.nan_to_num(0.0).abs() > worst.nan_to_num(0.0).abs()
            found[number] = torch.where(further, other[number].detach(), found[number].detach())
    return tree_unflatten(found, structure)


def _others(run: Callable[[], Any], orders: int) -> Iterator[Any]:
    with _threads(2):
        yield run()
    for seed in range(orders):
        # Small matrices are multiplied by other kernels than large ones, whose rows are split.
        with Reordered(seed, split_rows=seed % 2 == 1):
            yield run()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Exact(TorchDispatchMode):
    """A model in fp64 stays in fp64 where its code says fp32, as transformers' norms and rotations do.

    Without it what is called the truth has fp32's roundings itself.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        named = {name: wider(value) for name, value in (kwargs or {}).items()}
        return func(*(wider(value) for value in args), **named)


class Reordered(TorchDispatchMode):
    """Every sum under it, in forward and backward, runs over its terms in a random order.

    Matmuls over permuted K, reductions, softmax and norms over permuted axes, attention over permuted
    keys and features, an embedding's gradient over permuted tokens. Everything else is left as it is.
    """

    def __init__(self, seed: int, *, split_rows: bool = False) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.split_rows = split_rows

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        reordered = _REORDERED.get(func)
        if reordered is not None and _takes(args):
            return reordered(self, *args, **kwargs)
        # Under inference mode autograd doesn't take composite ops apart.
        with self:
            parts = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if parts is NotImplemented else parts


def _takes(args: tuple[Any, ...]) -> bool:
    tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    return bool(tensors) and all(t.numel() > 0 for t in tensors)


def _matmul(op: Any) -> Callable[..., Tensor]:
    """``[bias +] a[.., M, K] @ b[.., K, N]``, over K in another order; halves of the rows apart."""
    first = 1 if op in (aten.addmm.default, aten.baddbmm.default) else 0

    def run(mode: Reordered, *args: Any, **kwargs: Any) -> Tensor:
        before, (a, b) = args[:first], args[first : first + 2]
        order = mode.order(a.shape[-1])
        a, b = a.index_select(-1, order), b.index_select(-2, order)
        rows = a.shape[-2]
        if not mode.split_rows or rows < 2 or (before and before[0].dim() > 1):
            return op(*before, a, b, **kwargs)
        return torch.cat(
            [op(*before, part, b, **kwargs) for part in a.split(-(-rows // 2), -2)], -2
        )

    return run


def _reduction(op: Any) -> Callable[..., Tensor]:
    """A sum or mean over permuted axes."""

    def run(mode: Reordered, x: Tensor, dims: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        listed = range(x.dim()) if not dims else [dims] if isinstance(dims, int) else dims
        for dim in listed:
            x = x.index_select(dim, mode.order(x.shape[dim]))
        every = () if op in (aten.sum.default, aten.mean.default) else (dims, *args)
        return op(x, *every, **kwargs)

    return run


def _along(op: Any, tensors: int) -> Callable[..., Tensor]:
    """A softmax or its backward: as many tensors in, one out, along the axis that follows them."""

    def run(mode: Reordered, *args: Any, **kwargs: Any) -> Tensor:
        given, dim = args[:tensors], args[tensors]
        order = mode.order(given[0].shape[dim])
        permuted = (t.index_select(dim, order) for t in given)
        return op(*permuted, *args[tensors:], **kwargs).index_select(dim, order.argsort())

    return run


def _layer_norm(
    mode: Reordered, x: Tensor, shape: Any, weight: Any, bias: Any, eps: float
) -> tuple[Tensor, ...]:
    order = mode.order(x.shape[-1])
    weight, bias = (t if t is None else t.index_select(-1, order) for t in (weight, bias))
    y, *rest = aten.native_layer_norm(x.index_select(-1, order), shape, weight, bias, eps)
    return (y.index_select(-1, order.argsort()), *rest)


def _layer_norm_backward(
    mode: Reordered, dy: Tensor, x: Tensor, shape: Any, mean: Tensor, rstd: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    *affine, wanted = rest
    order = mode.order(x.shape[-1])
    rows = mode.order(x.shape[0]) if x.dim() > 1 else torch.arange(1)

    def turned(t: Tensor) -> Tensor:
        return t.index_select(0, rows) if x.dim() > 1 else t

    given = [turned(t).index_select(-1, order) for t in (dy, x)]
    affine = [t if t is None else t.index_select(-1, order) for t in affine]
    found = list(
        aten.native_layer_norm_backward(*given, shape, turned(mean), turned(rstd), *affine, wanted)
    )
    for number, gradient in enumerate(found):
        if gradient is not None:
            gradient = gradient.index_select(-1, order.argsort())
            back = number == 0 and x.dim() > 1
            found[number] = gradient.index_select(0, rows.argsort()) if back else gradient
    return tuple(found)


def _hidden(mask: Tensor | None, causal: bool, q: Tensor, num_keys: int) -> Tensor | None:
    """What is added to the scores [.., S, T], so that keys may change places."""
    if not causal:
        return mask
    future = torch.ones(q.shape[-2], num_keys, dtype=torch.bool).triu(1)
    hidden = torch.zeros(future.shape, dtype=q.dtype).masked_fill(future, -math.inf)
    return hidden if mask is None else hidden + mask


def _attention(
    mode: Reordered,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    keys, features = mode.order(k.shape[-2]), mode.order(q.shape[-1])
    mask = _hidden(attn_mask, causal, q, k.shape[-2])
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q.index_select(-1, features),
        k.index_select(-1, features).index_select(-2, keys),
        v.index_select(-2, keys),
        dropout,
        False,
        attn_mask=None if mask is None else _permuted_keys(mask, keys),
        scale=scale,
    )


def _permuted_keys(mask: Tensor, keys: Tensor) -> Tensor:
    return mask if mask.shape[-1] == 1 else mask.index_select(-1, keys).contiguous()


def _attention_backward(
    mode: Reordered,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dropout: float,
    causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, features = mode.order(k.shape[-2]), mode.order(q.shape[-1])
    mask = _hidden(attn_mask, causal, q, k.shape[-2])
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do,
        q.index_select(-1, features),
        k.index_select(-1, features).index_select(-2, keys),
        v.index_select(-2, keys),
        o,
        lse,
        dropout,
        False,
        attn_mask=None if mask is None else _permuted_keys(mask, keys),
        scale=scale,
    )
    back = features.argsort()
    dk, dv = (t.index_select(-2, keys.argsort()) for t in (dk, dv))
    return dq.index_select(-1, back), dk.index_select(-1, back), dv


def _embedding_backward(mode: Reordered, dy: Tensor, ids: Tensor, *rest: Any) -> Tensor:
    order = mode.order(ids.numel())
    rows = dy.flatten(0, -2).index_select(0, order)
    return aten.embedding_dense_backward(rows, ids.flatten().index_select(0, order), *rest)


_REORDERED: dict[Any, Callable[..., Any]] = {
    **{
        op: _matmul(op)
        for op in (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
    },
    **{
        op: _reduction(op)
        for op in (aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
    },
    aten._softmax.default: _along(aten._softmax.default, 1),
    aten._log_softmax.default: _along(aten._log_softmax.default, 1),
    aten._softmax_backward_data.default: _along(aten._softmax_backward_data.default, 2),
    aten._log_softmax_backward_data.default: _along(aten._log_softmax_backward_data.default, 2),
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
}
