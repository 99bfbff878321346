"""The norm of all gradients of a model that is cut over a mesh, and clipping by it.

    norm = (sum over the dense model's gradient elements of |g|^p)^(1/p)

Every element of the dense gradient counts once, wherever it lies: shards on the rank that has them; what
is replicated over tp, and KV heads of which several ranks have copies, on the first one; what FSDP cuts
over dp x cp on its owner, what DDP replicates there on this rank; a tied embedding, of which the last
stage of a pipeline has a copy, on the stage that owns it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from pyparallel.cut.shard import Range
from pyparallel.layers.total_norm import held_first, power_sum, reduced
from pyparallel.mesh import Mesh
from pyparallel.models.parallelize import named_shardings
from pyparallel.models.stage import tied_copies

# What torch.nn.utils.clip_grad_norm_ adds to the norm it divides by.
EPSILON = 1e-6


def grad_norm(
    model: nn.Module | Iterable[nn.Module], mesh: Mesh, *, norm_type: float = 2.0
) -> Tensor:
    """The norm of all gradients, the same bits on every rank; a call of all ranks of the mesh.

    Call it after backward has summed the gradients over dp x cp.

    Args:
        model: on this rank, wrapped by :func:`pyparallel.data_parallel` or not; several where this
            rank has several stages of a pipeline.
        norm_type: p, or ``inf`` for the largest element.

    Returns:
        A scalar: fp32, or fp64 where the gradients are.

    Communication: one all-reduce of a number over each axis that anything is cut over.

    Raises:
        ValueError: ``norm_type`` is not above 0, or a parameter is cut in a way that this does not know.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type: expected a number above 0, got {norm_type}")
    models = [model] if isinstance(model, nn.Module) else list(model)
    parameters = [p for each in models for p in each.parameters()]
    # What every rank of dp x cp has, and what is cut over them.
    replicated: list[Tensor] = []
    sharded: list[Tensor] = []
    for each in models:
        for piece, cut in _counted(each, mesh):
            (sharded if cut else replicated).append(piece)
    device = torch.device(mesh.device_mesh.device_type)
    op = "max" if math.isinf(norm_type) else "sum"
    total = power_sum(sharded, norm_type, device)
    if any(isinstance(p, DTensor) for p in parameters):
        total = reduced(reduced(total, mesh.cp, op), mesh.dp, op)
    total = torch.stack([power_sum(replicated, norm_type, device), total])
    total = total.amax() if op == "max" else total.sum()
    total = reduced(reduced(total, mesh.tp, op), mesh.pp, op)
    norm = total if op == "max" else total ** (1 / norm_type)
    wide = any(p.dtype == torch.float64 for p in parameters)
    return norm if wide else norm.float()


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module | Iterable[nn.Module],
    max_norm: float,
    mesh: Mesh,
    *,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``; returns the norm before.

    As ``torch.nn.utils.clip_grad_norm_`` of the dense model; ``model`` and the rest as in
    :func:`grad_norm`.

    Raises:
        ValueError: ``max_norm`` is below 0; what :func:`grad_norm` raises.
        RuntimeError: the norm is not finite, and ``error_if_nonfinite``; on every rank.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm: expected 0 or more, got {max_norm}")
    models = [model] if isinstance(model, nn.Module) else list(model)
    norm = grad_norm(models, mesh, norm_type=norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"clip_grad_norm_: the gradients' norm of order {norm_type} is {norm.item()}; "
            f"scale them by something finite, or skip this step"
        )
    factor = torch.clamp(max_norm / (norm + EPSILON), max=1.0)
    gradients = [p.grad for m in models for p in m.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    for gradient in local:
        gradient.mul_(factor.to(gradient.dtype))
    return norm


def _counted(model: nn.Module, mesh: Mesh) -> Iterator[tuple[Tensor, bool]]:
    """The pieces of this rank's gradients that it counts, and whether they are cut over dp x cp."""
    shardings, copies = named_shardings(model), tied_copies(model)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None or name in copies:
            continue
        gradient = gradient if gradient.dim() else gradient.unsqueeze(0)
        dim, ranges = held_first(shardings[name], gradient.shape, mesh.tp.rank)
        cut = isinstance(gradient, DTensor)
        if cut:
            ranges = _within(name, gradient, mesh, dim, ranges)
            gradient = gradient.to_local()
        for start, stop in ranges:
            yield gradient.narrow(dim, start, stop - start), cut


def _within(name: str, gradient: DTensor, mesh: Mesh, dim: int, ranges: list[Range]) -> list[Range]:
    """``ranges`` of axis ``dim`` of what FSDP has cut, in the places of this rank's part."""
    if gradient.device_mesh != mesh.data_mesh:
        raise ValueError(
            f"{name}: expected a gradient cut over mesh.data_mesh, got one over "
            f"{gradient.device_mesh}; use data_parallel(engine='fsdp')"
        )
    sizes, offsets = compute_local_shape_and_global_offset(
        gradient.shape, gradient.device_mesh, gradient.placements
    )
    low, high = offsets[dim], offsets[dim] + sizes[dim]
    inside = [(max(start, low), min(stop, high)) for start, stop in ranges]
    return [(start - low, stop - low) for start, stop in inside if start < stop]
