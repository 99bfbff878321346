"""What tests share: ranks, inputs, NaN-poisoned memory, error bounds, and a dense attention.

Two kinds of comparison, and nothing in between:

- *Exact.* Inputs are small integers (:func:`integers`), so every product and sum of a matmul is exact
  in every dtype, in every order and over every number of ranks: tolerance zero.
- *Bounded.* Real inputs, against the truth in fp64. What has a closed worst case keeps it: matmuls
  that of :func:`sum_bound`, attention and norms those of ``tests/bounds.py``. Whole models keep that
  of :func:`assert_as_dense`, whose measured part is over several legal orders (``tests/orders.py``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyparallel import reference
from pyparallel.comm.group import Group
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh

# Half the distance from 1 to the next number: the largest relative error of one rounding.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# Moves every random input: `make test-processors` runs the numerical tests with several.
SEED = 1_000_003 * int(os.environ.get("PYPARALLEL_TEST_SEED", "0"))

# What poisoned integers hold: an index or a count that fails wherever it is used.
POISON = -77_777


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    shares: Sequence[int] | None = None,
    timeout_s: float = 60.0,
) -> list[Any]:
    """``fn(group, *args)`` on the ranks of one tp group, with poisoned memory; results by rank."""
    return launch(_in_group, world_size, fn, args, shares, threads=1, timeout_s=timeout_s)


def _in_group(
    fn: Callable[..., Any], args: tuple[Any, ...], shares: Sequence[int] | None = None
) -> Any:
    group = init_mesh(tp=torch.distributed.get_world_size(), shares=shares).tp
    with poisoned_empty():
        return fn(group, *args)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Uninitialised tensors hold NaN (integers: POISON), so an element nobody wrote is seen."""
    names = ("empty", "empty_like")
    saved = {name: getattr(torch, name) for name in names}
    for name, make in saved.items():
        setattr(torch, name, _poisoning(make))
    # These live on the C base class: setting them on the Python class shadows, deleting restores.
    torch.Tensor.new_empty = _poisoning(torch._C.TensorBase.new_empty)
    try:
        yield
    finally:
        del torch.Tensor.new_empty
        for name, make in saved.items():
            setattr(torch, name, make)


def _poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.is_meta:
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(math.nan)
            elif tensor.dtype != torch.bool:
                tensor.fill_(POISON % 251 if tensor.itemsize == 1 else POISON)
        return tensor

    return poisoned


def integers(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, low: int = -1, high: int = 1
) -> Tensor:
    """Integers in [low, high]. Sums of up to 256 products of {-1, 0, 1} are exact in bfloat16."""
    generator = torch.Generator().manual_seed(SEED + seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def normals(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    """Normal numbers, rounded to ``dtype``: every rank that asks gets the same."""
    generator = torch.Generator().manual_seed(SEED + seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def sum_bound(magnitude: Tensor, terms: int, ranks: int, dtype: torch.dtype) -> Tensor:
    """The worst-case error of a matmul (+ bias) in ``dtype`` whose terms are cut over ``ranks``.

    Let A be the sum of the terms' absolute values, v = 2^-24 (fp32, which accumulates) and u the unit
    roundoff of ``dtype``. Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1: a
    sum of n products in any order errs by at most ``n v / (1 - n v) A``. A rank's partial sum is rounded
    to ``dtype`` (u A over all ranks), the R partial sums are added in fp32 (R v A) and rounded (u A),
    and the bias is added and rounded once more (u A). Factors (1 + u) of later roundings are in the
    final 1.1.

    Args:
        magnitude: A, fp64: the same matmul of absolute values, the bias's included.
        terms: n, the number of products.
    """
    v = min(UNIT_ROUNDOFF[torch.float32], UNIT_ROUNDOFF[dtype])
    u = UNIT_ROUNDOFF[dtype]
    return 1.1 * (terms * v / (1 - terms * v) + ranks * v + 3 * u) * magnitude


def assert_within(actual: Tensor, truth: Tensor, bound: Tensor | float, what: str) -> None:
    """``|actual - truth| <= bound`` everywhere; a NaN fails."""
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, not {truth.shape}"
    error = (actual.detach().double() - truth.detach().double()).abs()
    excess = error - bound
    if not bool((excess <= 0).all()):
        worst = int(excess.nan_to_num(math.inf).argmax())
        raise AssertionError(
            f"{what}: {actual.flatten()[worst]} at {worst}, expected {truth.flatten()[worst]}; "
            f"error {float(error.flatten()[worst]):.3g} is {float(excess.flatten()[worst]):.3g} "
            f"above the bound"
        )


def assert_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """The same shape, dtype and values, bit for bit but for the sign of zero."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, not {expected.dtype}"
    assert torch.equal(actual, expected), (
        f"{what}: {int((actual != expected).sum())} of {actual.numel()} differ, by up to "
        f"{float((actual.double() - expected.double()).abs().max()):.3g}"
    )


def assert_as_dense(
    actual: Tensor,
    dense: Tensor,
    truth: Tensor,
    ranks: int,
    what: str,
    *,
    part: Callable[[Tensor], Tensor] | None = None,
    family: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """``actual`` errs no more than the dense module in the same dtype, but for its R partial sums.

    The parallel module rounds where the dense one does, with errors of the same size e = max |dense -
    truth|; there is no closed worst case through a whole model, so e is measured, over several legal
    orders of every sum (``tests/orders.py``): one run is one draw, and may be lucky. A sum over ranks
    rounds R partial sums instead of one: with signs that don't conspire their errors add up to sqrt(R)
    times one rounding. Hence ``(1 + sqrt(R)) (e + u max |truth|)``, in the largest norm of the tensor.

    Args:
        dense: the dense module's result in the same dtype; of each element what came out farthest from
            the truth.
        truth: the dense module's result in fp64.
        part: what of the truth ``actual`` is. Errors are the whole tensor's: a few elements may happen
            to be nearly exact.
        family: pairs (dense, truth) of tensors that are made as this one is, such as all layers'; the
            largest error and magnitude of all counts.
    """
    own = truth.detach() if part is None else part(truth.detach())
    if truth.numel() == 0:
        assert actual.shape == own.shape, f"{what}: shape {actual.shape}, not {own.shape}"
        return
    bound = max(dense_bound(*pair, ranks, what) for pair in ((dense, truth), *family))
    assert_within(actual, own, bound, what)


def dense_bound(dense: Tensor, truth: Tensor, ranks: int, what: str) -> float:
    """The bound of :func:`assert_as_dense`, of one tensor."""
    dense, truth = dense.detach(), truth.detach()
    assert dense.isfinite().all() and truth.isfinite().all(), (
        f"{what}: the dense result is not finite"
    )
    error = float((dense.double() - truth).abs().max())
    return (1 + math.sqrt(ranks)) * (error + UNIT_ROUNDOFF[dense.dtype] * float(truth.abs().max()))


def dense_attention(
    x: Tensor,
    weights: dict[str, Tensor | None],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    causal: bool = False,
    window: int | None = None,
    frequencies: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Self-attention written out, in the dtype of ``x`` (fp64 stays fp64).

    Args:
        x: [B, S, H], from position 0 on.
        weights: ``qkv`` [(N + 2G) D, H], ``out`` [H, N D], and, where there are any, ``qkv_bias``,
            ``out_bias``, ``q_norm`` and ``k_norm`` [D] (epsilon 1e-6).
        frequencies: [E], of the rotary embedding, where there is one.
    """
    fused = F.linear(x, weights["qkv"], weights.get("qkv_bias"))
    heads = fused.unflatten(-1, (num_heads + 2 * num_kv_heads, head_dim))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], 2)
    if weights.get("q_norm") is not None:
        q = reference.rms_norm(q, weights["q_norm"], 1e-6)
        k = reference.rms_norm(k, weights["k_norm"], 1e-6)
    if frequencies is not None:
        angles = torch.arange(x.shape[1]).unsqueeze(1) * frequencies
        q, k = (reference.rope(t, angles.cos(), angles.sin()) for t in (q, k))
    o, _ = reference.attention(q, k, v, causal=causal, window=window, mask=mask)
    return F.linear(o.flatten(2), weights["out"], weights.get("out_bias"))


def own(module: torch.nn.Module, name: str, dense: Tensor, group: Group) -> Tensor:
    """This rank's part of a dense tensor that is cut as parameter ``name`` of ``module``."""
    return module.shardings[name].split(dense, group.rank)
