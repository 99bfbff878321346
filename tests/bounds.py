"""Closed bounds of rounding for what has them: attention, and norms, forward and backward.

All are of the operation, not of one run: what may be lost when terms are summed in any order, on any
processor. Legend: v the unit roundoff of what accumulates (fp32; fp64 for fp64), u that of the tensors'
dtype. To first order, a sum of n terms t errs by at most n v sum |t| (Higham 2002, "Accuracy and
Stability of Numerical Algorithms", sections 3.1 and 4.2); errors go on through products and quotients
by the first-order rules. Where terms cancel, the bound is that of the terms, never of the result: a
difference of equal numbers is rounding alone, and its truth is 0. The second-order terms are in
:data:`SECOND_ORDER`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyparallel import reference
from pyparallel.testing import UNIT_ROUNDOFF

SECOND_ORDER = 1.1
# Vector libraries' exp and rsqrt are right to a few units in the last place (oneMKL's "low accuracy"
# and Sleef's u10 functions: below 4).
ULPS = 4


def units(dtype: torch.dtype) -> tuple[float, float]:
    """(v, u). For fp64 both doubled: the truth has been rounded as well."""
    u = UNIT_ROUNDOFF[dtype]
    if dtype is torch.float64:
        return 2 * u, 2 * u
    return UNIT_ROUNDOFF[torch.float32], u


def attention_bounds(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    *,
    parts: int = 1,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """The worst errors of o, lse, dq, dk and dv of :func:`pyparallel.reference.attention`.

    With a = scale sum_d |q_d k_d| a score errs by ds <= (D + 2) v a. A half-precision kernel's
    exponentials are as exact as its dtype, others as their library (ULPS v). So of one query

        lse   errs by   L = max_j ds_j + ULPS u + (T + ULPS) v + v |lse|
        p_j   relatively by   e = max_j ds_j + L + (ULPS + 1) u
        o     by   sum_j p_j |v_j|  (e + T v + (parts + 1) u)
        dv    by   sum_i p_ij |do_i|  (max_i e + S v + (parts + 1) u)

    and with P_ij = sum_d |do_id v_jd| and the mean of the same over keys, P_i = sum_j p_ij P_ij, which
    bounds delta's terms also where they are taken as do o: ds_ij = p_ij (dp_ij - delta_i) errs by
    p_ij (P_ij + P_i) E with E = 2 e + (D + T + 2) v + 3 u, and

        dq    by   scale sum_j p_ij (P_ij + P_i) |k_j|  (E + T v + (parts + 1) u)
        dk    by   scale sum_i p_ij (P_ij + P_i) |q_i|  (max_i E + S v + (parts + 1) u)

    Args:
        q, k, v, do: [B, S, N, D], [B, T, G, D], [B, T, G, D] and [B, S, N, D], exact in their dtype.
        parts: over how many ranks keys are spread: each part's result is rounded.
    """
    small, unit = units(q.dtype)
    batch, num_queries, heads, size = q.shape
    num_keys, kv_heads = k.shape[1], k.shape[2]
    repeats = heads // kv_heads
    scale = 1 / math.sqrt(size) if scale is None else scale
    wide_q, wide_do = (t.detach().double().transpose(1, 2) for t in (q, do))
    wide_k, wide_v = (
        t.detach().double().transpose(1, 2).repeat_interleave(repeats, 1) for t in (k, v)
    )
    seen = reference.attention_mask(num_queries, num_keys, causal=causal, window=window)
    seen = (seen if mask is None else seen & mask).expand(batch, heads, -1, -1)
    scores = (scale * wide_q @ wide_k.mT).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    p = torch.exp(scores - lse)

    absolute = (scale * wide_q.abs() @ wide_k.abs().mT).masked_fill(~seen, 0.0)
    of_scores = (size + 2) * small * absolute.amax(-1, keepdim=True)
    of_lse = of_scores + ULPS * unit + (num_keys + ULPS + lse.abs()) * small
    e = of_scores + of_lse + (ULPS + 1) * unit
    rounded = (parts + 1) * unit

    def over_repeats(bound: Tensor) -> Tensor:
        return bound.unflatten(1, (kv_heads, repeats)).sum(2).transpose(1, 2)

    o = (p @ wide_v.abs()) * (e + num_keys * small + rounded)
    terms = repeats * num_queries
    dv = p.mT @ (wide_do.abs() * (e + terms * small + rounded))
    magnitude = wide_do.abs() @ wide_v.abs().mT
    magnitude = p * (magnitude + (p * magnitude).sum(-1, keepdim=True))
    big_e = 2 * e + (size + num_keys + 2) * small + 3 * unit
    dq = scale * (magnitude * (big_e + num_keys * small + rounded)) @ wide_k.abs()
    dk = scale * (magnitude * (big_e + terms * small + rounded)).mT @ wide_q.abs()
    found = [o.transpose(1, 2), of_lse.squeeze(-1), dq.transpose(1, 2)]
    return [SECOND_ORDER * bound for bound in (*found, over_repeats(dk), over_repeats(dv))]


def norm_bounds(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centred: bool,
    parts: int = 1,
) -> dict[str, Tensor]:
    """The worst errors of y, dx, dweight and dbias of LayerNorm (``centred``) or RMSNorm.

    x [.., H]; mean m and r = 1 / sqrt(mean (x - m)^2 + eps) may be rounded to the dtype (torch's kernels
    keep them so), and the variance may be a difference of mean squares:

        m     errs by   d_m = (H + 1) v mean |x| + u |m|        (RMSNorm: m = 0, d_m = 0)
        x - m by        d_c = d_m + v (|x| + |m|)
        r     relatively by   d_r = (H + 4) v mean x^2 r^2 + ULPS v + u
        h = r (x - m)   by    d_h = r d_c + |h| (d_r + 2 v)
        y = w h + b     by    |w| d_h + (2 v + u) (|w h| + |b|)
        dx = r (g - mean g - h mean(g h)), g = w dy   (RMSNorm: no mean g)
              by   r ((|g| + mean |g| + |h| mean |g h|) (d_r + (H + 6) v + u)
                      + d_h mean |g h| + |h| mean(|g| d_h))
        dw    by   sum over the N rows |dy| (d_h + ((N + 2) v + (parts + 1) u) |h|)
        db    by   (N v + (parts + 1) u) sum |dy|
    """
    small, unit = units(x.dtype)
    x, dy = x.detach().double(), dy.detach().double()
    size, rows = x.shape[-1], x[..., 0].numel()
    w = torch.ones(size, dtype=torch.float64) if weight is None else weight.detach().double()
    b = torch.zeros(size, dtype=torch.float64) if bias is None else bias.detach().double()

    def mean(t: Tensor) -> Tensor:
        return t.mean(-1, keepdim=True)

    m = mean(x) if centred else torch.zeros_like(mean(x))
    r = (mean((x - m) ** 2) + eps).rsqrt()
    h = r * (x - m)
    of_m = (size + 1) * small * mean(x.abs()) + unit * m.abs() if centred else 0.0
    of_c = of_m + small * (x.abs() + m.abs())
    of_r = (size + 4) * small * mean(x**2) * r**2 + ULPS * small + unit
    of_h = r * of_c + h.abs() * (of_r + 2 * small)
    y = w.abs() * of_h + (2 * small + unit) * ((w * h).abs() + b.abs())
    g = (w * dy).abs()
    with_h = mean(g * h.abs())
    dx = r * (
        (g + (mean(g) if centred else 0.0) + h.abs() * with_h) * (of_r + (size + 6) * small + unit)
        + of_h * with_h
        + h.abs() * mean(g * of_h)
    )
    rounded = (parts + 1) * unit
    dw = (dy.abs() * (of_h + ((rows + 2) * small + rounded) * h.abs())).reshape(-1, size).sum(0)
    db = (rows * small + rounded) * dy.abs().reshape(-1, size).sum(0)
    found = {"y": y, "dx": dx, "dweight": dw, "dbias": db}
    return {name: SECOND_ORDER * bound for name, bound in found.items()}
