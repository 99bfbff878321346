"""The mean loss over all tokens of a batch that is cut over dp and cp.

    L = (sum over dp x cp of l_r) / (sum over dp x cp of n_r)

l_r is the sum of the losses of this rank's tokens and n_r the number of its targets. A mean of the
ranks' means is another number where the n_r differ: padding, ignored prompts, uneven shards.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pyparallel.comm.collectives import all_gather_raw, all_reduce_raw
from pyparallel.mesh import Mesh
from pyparallel.ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy


class _Mean(Function):
    """forward: the global mean; backward: dl_r = dL / n, this rank's part of the gradient."""

    @staticmethod
    def forward(ctx, total: Tensor, count: Tensor, mesh: Mesh, counted: bool) -> Tensor:
        # fp64 holds counts exactly, and a sum of fp32 losses to their last bit.
        packed = torch.stack([total.double(), count.double()])
        whole = _sum(packed, mesh)
        ctx.count = count.double() if counted else whole[1]
        return (whole[0] / ctx.count).to(total.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return (grad / ctx.count).to(grad.dtype), None, None, None


def mean_loss(total: Tensor, count: Tensor | int, mesh: Mesh, *, counted: bool = False) -> Tensor:
    """The mean over the tokens of all ranks of dp x cp; the same on each of them.

    Its gradients are this rank's parts, of which :func:`pyparallel.data_parallel` makes the sums that
    are the gradients of the mean.

    Args:
        total: the sum of the losses of this rank's tokens, a scalar; the same on all ranks of tp.
        count: how many they are.
        counted: ``count`` is of all ranks' tokens already, from :func:`count_targets`. Micro-batches
            that share such a count have losses that add up to the mean.

    Communication: one all-reduce of two fp64 numbers over cp and one over dp; none backward.

    Raises:
        ValueError: ``total`` is not a scalar.
    """
    if total.dim():
        raise ValueError(
            f"total: expected the sum of this rank's losses, got shape {tuple(total.shape)}"
        )
    return _Mean.apply(total, torch.as_tensor(count, device=total.device), mesh, counted)


def count_targets(
    targets: Tensor, mesh: Mesh, *, whole: bool = False, ignore_index: int = -100
) -> Tensor:
    """How many targets of all ranks of dp x cp count, a scalar int64.

    The sum over dp is always taken: ``targets`` are this replica's sequences, never the whole batch's.

    Args:
        targets: of this replica's sequences; this rank's part of them along cp, as
            ``model.shards(S).split`` cuts them.
        whole: the sequences are not cut over cp: all its ranks have the same targets, which count once.
            So a transformers model takes its labels, of which ``labels[:, 1:]`` are the targets. It says
            nothing of the batch; without cp it changes nothing.

    Raises:
        RuntimeError: ``whole``, and ranks of cp have other targets, so that these are parts.
    """
    count = (targets != ignore_index).sum()
    if whole:
        if mesh.cp.size > 1:
            _check_whole(targets, mesh)
        return all_reduce_raw(count, mesh.dp) if mesh.dp.size > 1 else count
    return _sum(count, mesh)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mesh: Mesh,
    *,
    vocab_size: int | None = None,
    count: Tensor | int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The mean cross-entropy of all ranks' tokens; the same on every rank.

    Shift the targets before they are cut over cp: a token's next one may lie on another rank.

    Args:
        logits: of this rank's tokens: [..., V], or with ``vocab_size`` this tp rank's [..., V_r], which
            are not gathered.
        targets: [...], int64.
        vocab_size: V, where the logits are cut over tp.
        count: as from :func:`count_targets`; by default the targets of this call.
        ignore_index, label_smoothing, z_loss: as in :func:`vocab_parallel_cross_entropy`, which takes
            z_loss where the logits are cut.

    Raises:
        ValueError: shapes or options that don't fit.
    """
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": "sum",
    }
    if vocab_size is not None:
        total = vocab_parallel_cross_entropy(
            logits, targets, group=mesh.tp, vocab_size=vocab_size, z_loss=z_loss, **options
        )
    elif z_loss:
        raise ValueError(f"z_loss: expected 0 for whole logits, got {z_loss}; give vocab_size")
    elif logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: expected shape {tuple(logits.shape[:-1])}, one for each row of the logits, got "
            f"{tuple(targets.shape)}"
        )
    else:
        flat = logits.flatten(0, -2) if logits.dim() > 2 else logits
        total = F.cross_entropy(flat, targets.flatten() if targets.dim() else targets, **options)
    if count is not None:
        return mean_loss(total, count, mesh, counted=True)
    return mean_loss(total, (targets != ignore_index).sum(), mesh)


def _check_whole(targets: Tensor, mesh: Mesh) -> None:
    """The ranks of cp have the same targets, by the sum of each times its place. Communication: one
    all-gather of a number."""
    places = torch.arange(1, targets.numel() + 1, device=targets.device)
    told = all_gather_raw((targets.flatten() * places).sum().reshape(1), mesh.cp)
    # Asynchronous: no device waits for it.
    torch._assert_async(
        (told == told[0]).all(),
        f"whole: expected False for targets that are cut over cp={mesh.cp.size}, whose ranks have "
        f"others; whole=True is for sequences that every rank of cp has whole",
    )


def _sum(x: Tensor, mesh: Mesh) -> Tensor:
    for group in (mesh.cp, mesh.dp):
        if group.size > 1:
            x = all_reduce_raw(x, group)
    return x
