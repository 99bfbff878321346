"""Cross-entropy over a vocabulary shard: no rank ever holds a whole row of logits.

Rank r holds logits [T, V_r], columns vocab_start .. vocab_start + V_r of V. Per row:

    1. statistics (this rank):  m = max, e = sum exp(logit - m), t = target's logit (0 if
       not here), s = sum of logits, or of (logit - m) if centered        -> [T, 4] fp32
    2. combine (from all ranks' [R, T, 4], in rank order; s as it is):
           M = max m,  L = log(sum e exp(m - M)),  lse = M + L
           loss = L + M - (1 - smoothing) * sum t - smoothing / V * sum s
    3. gradient, written over the logits:
           dlogit = dloss * (exp(logit - M - L) - (1 - smoothing) [v = target] - smoothing / V)

Where logits are far from 0 the sum M + L loses L's digits, so M - t comes first in 2, and 3
takes M and L apart; s is then exact only centered.

Only the [T, 4] statistics travel between ranks. Rows whose target is ignore_index have
loss 0 and gradient 0. The running maximum and sum of step 1 follow Milakov and Gimelshein
(2018), "Online normalizer calculation for softmax".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyparallel.kernels.language import narrow
from pyparallel.kernels.launch import (
    FLOATS,
    cdiv,
    check_dtype,
    check_last_contiguous,
    check_runnable,
    check_shape,
)

BLOCK_V = 4096


@triton.jit
def cross_entropy_statistics_kernel(
    logits_ptr, targets_ptr, stats_ptr, V, stride_t, vocab_start, ignore_index,
    BLOCK_V: tl.constexpr, CENTERED: tl.constexpr = False,
):
    """Grid (T): one row a program; stats [T, 4] = (m, e, t, s)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row) - vocab_start
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    logit_sum = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = cols < V
        x = tl.load(logits_ptr + row * stride_t + cols, mask=mask, other=float("-inf"))
        x = x.to(tl.float32)
        higher = tl.maximum(maximum, tl.max(x, axis=0))
        # A row of -inf so far: subtracting it from itself would give NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(maximum - base) + tl.sum(tl.exp(x - base), axis=0)
        if CENTERED:
            # The columns before this block were centered on another maximum.
            before = tl.where(maximum == float("-inf"), 0.0, maximum)
            logit_sum += start * (before - base) + tl.sum(tl.where(mask, x - base, 0.0), axis=0)
        else:
            logit_sum += tl.sum(tl.where(mask, x, 0.0), axis=0)
        maximum = higher
    here = (target >= 0) & (target < V) & (target + vocab_start != ignore_index)
    target_logit = tl.load(logits_ptr + row * stride_t + target, mask=here, other=0.0)
    tl.store(stats_ptr + row * 4, maximum)
    tl.store(stats_ptr + row * 4 + 1, total)
    tl.store(stats_ptr + row * 4 + 2, target_logit.to(tl.float32))
    tl.store(stats_ptr + row * 4 + 3, logit_sum)


@triton.jit
def cross_entropy_combine_kernel(
    stats_ptr, targets_ptr, loss_ptr, lse_ptr, T, vocab_size, ignore_index, label_smoothing,
    R: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """Grid (tiles of T): stats [R, T, 4] -> loss [T], lse [T]; sums run in rank order."""
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    ok = rows < T
    maximum = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    for r in tl.static_range(R):
        here = tl.load(stats_ptr + (r * T + rows) * 4, mask=ok, other=0.0)
        maximum = tl.maximum(maximum, here)
    total = tl.zeros((BLOCK_T,), tl.float32)
    target_logit = tl.zeros((BLOCK_T,), tl.float32)
    logit_sum = tl.zeros((BLOCK_T,), tl.float32)
    for r in tl.static_range(R):
        base = stats_ptr + (r * T + rows) * 4
        here = tl.load(base, mask=ok, other=0.0)
        # A rank without columns has m = -inf and e = 0.
        total += tl.load(base + 1, mask=ok, other=1.0) * tl.exp(here - maximum)
        target_logit += tl.load(base + 2, mask=ok, other=0.0)
        logit_sum += tl.load(base + 3, mask=ok, other=0.0)
    lse = maximum + tl.log(total)
    loss = tl.log(total) + (1.0 - label_smoothing) * (maximum - target_logit)
    if SMOOTH:
        loss += label_smoothing * (maximum - logit_sum / vocab_size)
    target = tl.load(targets_ptr + rows, mask=ok, other=0)
    tl.store(loss_ptr + rows, tl.where(target == ignore_index, 0.0, loss), mask=ok)
    tl.store(lse_ptr + rows, lse, mask=ok)


@triton.jit
def cross_entropy_backward_kernel(
    logits_ptr, targets_ptr, lse_ptr, dloss_ptr, V, stride_t, stride_d, vocab_start,
    vocab_size, ignore_index, label_smoothing, BLOCK_V: tl.constexpr, base_ptr=None,
):
    """Grid (T, tiles of V): the gradient over the logits, in place."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = cols < V
    target = tl.load(targets_ptr + row)
    dloss = tl.load(dloss_ptr + row * stride_d).to(tl.float32)
    lse = tl.load(lse_ptr + row)
    ptrs = logits_ptr + row * stride_t + cols
    x = tl.load(ptrs, mask=mask, other=float("-inf")).to(tl.float32)
    if base_ptr is not None:
        x -= tl.load(base_ptr + row)
    grad = tl.exp(x - lse) - label_smoothing / vocab_size
    grad -= tl.where(cols == target - vocab_start, 1.0 - label_smoothing, 0.0)
    # Not a product with dloss: an ignored row's logits may be infinite.
    grad = tl.where(target == ignore_index, 0.0, grad * dloss)
    tl.store(ptrs, narrow(grad, logits_ptr.dtype.element_ty), mask=mask)


def _check(logits: torch.Tensor, targets: torch.Tensor) -> None:
    check_runnable("cross_entropy", logits, targets)
    check_dtype("logits", logits, FLOATS)
    if logits.dim() != 2:
        raise ValueError(f"logits: expected [T, V], got {tuple(logits.shape)}; flatten the tokens")
    check_last_contiguous("logits", logits)
    check_shape("targets", targets, (logits.shape[0],))
    check_dtype("targets", targets, (torch.int64, torch.int32))


def cross_entropy_statistics(
    logits: torch.Tensor, targets: torch.Tensor, *, vocab_start: int = 0, ignore_index: int = -100,
    centered: bool = False,
) -> torch.Tensor:
    """Step 1: logits [T, V_r], targets [T] (ids of the whole vocabulary) -> [T, 4] fp32."""
    _check(logits, targets)
    stats = torch.empty(logits.shape[0], 4, dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        cross_entropy_statistics_kernel[(logits.shape[0],)](
            logits, targets.contiguous(), stats, logits.shape[1], logits.stride(0), vocab_start,
            ignore_index, BLOCK_V=BLOCK_V, CENTERED=centered, num_warps=8,
        )
    return stats


def cross_entropy_combine(
    stats: torch.Tensor, targets: torch.Tensor, *, vocab_size: int, ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 2: stats [R, T, 4] of all ranks -> (loss [T], lse [T]) fp32, alike on every rank."""
    check_runnable("cross_entropy", stats, targets)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    num_ranks, num_rows = stats.shape[:2]
    check_shape("stats", stats, (num_ranks, targets.shape[0], 4))
    loss = torch.empty(num_rows, dtype=torch.float32, device=stats.device)
    lse = torch.empty_like(loss)
    if num_rows:
        cross_entropy_combine_kernel[(cdiv(num_rows, 128),)](
            stats.contiguous(), targets.contiguous(), loss, lse, num_rows, vocab_size,
            ignore_index, label_smoothing, R=num_ranks, SMOOTH=label_smoothing > 0, BLOCK_T=128,
            num_warps=4,
        )
    return loss, lse


def cross_entropy_backward_(
    logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, dloss: torch.Tensor, *,
    vocab_size: int, vocab_start: int = 0, ignore_index: int = -100, label_smoothing: float = 0.0,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """Step 3: overwrite logits [T, V_r] with their gradient. dloss [T], or one value; lse [T] is
    that of logits - base, where base [T] is given."""
    _check(logits, targets)
    check_shape("lse", lse, (logits.shape[0],))
    if base is not None:
        check_shape("base", base, (logits.shape[0],))
    stride_d = 0 if dloss.numel() == 1 else 1
    if stride_d:
        check_shape("dloss", dloss, (logits.shape[0],))
    if logits.numel():
        cross_entropy_backward_kernel[logits.shape[0], cdiv(logits.shape[1], BLOCK_V)](
            logits, targets.contiguous(), lse, dloss.contiguous(), logits.shape[1],
            logits.stride(0), stride_d, vocab_start, vocab_size, ignore_index, label_smoothing,
            BLOCK_V=BLOCK_V, base_ptr=base, num_warps=8,
        )
    return logits
