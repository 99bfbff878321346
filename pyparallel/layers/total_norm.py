"""Torch's norm of all gradients, and what clips by it, where a gradient is a shard of the dense one.

    norm = (sum over the dense model's gradient elements of |g|^p)^(1/p)

``torch.nn.utils.get_total_norm`` is what ``clip_grad_norm_`` asks, torch's, Accelerate's and that of
transformers' Trainer. Where it is given gradients of a model that is cut over tp it gives the dense
model's norm: every rank counts what no lower rank has too, and the sums are added up over the ranks.
A pipeline's stages and FSDP's parts of shards are refused by name, since
:func:`pyparallel.clip_grad_norm_` knows the mesh that they need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.group import Group
from pyparallel.cut.shard import Range, Sharding
from pyparallel.layers.find_shards import Shard, find_shards, is_dtensor

# Torch's function is a wrapper, and whoever has imported it by its name holds that; so what it wraps is
# replaced.
_wrapped = clip_grad._get_total_norm.__closure__[0]
_torchs_own = _wrapped.cell_contents


def total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """``torch.nn.utils.get_total_norm`` of the dense tensors that these are parts of.

    Args:
        tensors: gradients or parameters; of shards those of all ranks, each rank with its own. What is
            no shard is taken to be the same on all ranks.

    Returns:
        A scalar, the same bits on every rank: fp32, or fp64 where a tensor is. Without a shard, torch's.

    Communication: where there is a shard, one all-reduce of a number over its group.

    Raises:
        ValueError: the shards lie on several groups, on a pipeline's stages or in FSDP's parts; an order
            that is not above 0, with shards.
        RuntimeError: the norm is not finite, and ``error_if_nonfinite``; on every rank.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    shards = find_shards(tensors)
    held = [shard for shard in shards if shard is not None]
    if not held:
        return _torchs_own(tensors, norm_type, error_if_nonfinite, foreach)
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(
            f"norm_type: expected a number above 0, since {held[0].label} is cut over "
            f"{held[0].group.size} ranks; got {norm_type}"
        )
    group = _only_group(tensors, held)
    pieces = []
    for tensor, shard in zip(tensors, shards, strict=True):
        tensor = tensor if tensor.dim() else tensor.unsqueeze(0)
        sharding = Sharding(None) if shard is None else shard.sharding
        dim, ranges = held_first(sharding, tensor.shape, group.rank)
        pieces += [tensor.narrow(dim, start, stop - start) for start, stop in ranges]
    op = "max" if math.isinf(norm_type) else "sum"
    total = reduced(power_sum(pieces, norm_type, tensors[0].device), group, op)
    norm = total if op == "max" else total ** (1 / norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"clip_grad_norm_: the gradients' norm of order {norm_type} is {norm.item()}; "
            f"scale them by something finite, or skip this step"
        )
    return norm if any(tensor.dtype == torch.float64 for tensor in tensors) else norm.float()


def _only_group(tensors: Sequence[Tensor], held: Sequence[Shard]) -> Group:
    """The one group that everything is cut over.

    Raises:
        ValueError: there is more to sum over.
    """
    groups = {shard.group.handle: shard.group for shard in held}
    why = None
    if any(shard.stages > 1 for shard in held):
        why = "they are a stage's of a pipeline"
    elif any(is_dtensor(tensor) for tensor in tensors):
        why = "FSDP has cut them too"
    elif len(groups) > 1:
        why = f"these are cut over {len(groups)} groups of ranks"
    if why is not None:
        raise ValueError(
            f"clip_grad_norm_: expected parameters that are cut over tp alone, but {why}; use "
            f"pyparallel.clip_grad_norm_(model, max_norm, mesh), or pyparallel.grad_norm(model, mesh)"
        )
    return next(iter(groups.values()))


def held_first(sharding: Sharding, shape: Sequence[int], rank: int) -> tuple[int, list[Range]]:
    """The axis and the ranges of rank's shard, of ``shape``, that it is the first to hold."""
    if sharding.dim is None:
        return 0, [] if rank else [(0, shape[0])]
    return sharding.dim, sharding.first_held(rank)


def power_sum(tensors: Iterable[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The sum of the elements' absolute p-th powers, or their maximum, in fp64."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    norms = torch.stack(torch._foreach_norm(tensors, norm_type, dtype=wide)).double()
    return norms.amax() if math.isinf(norm_type) else (norms**norm_type).sum()


def reduced(total: Tensor, group: Group, op: str) -> Tensor:
    """The sum or the maximum over the group's ranks."""
    return all_reduce_raw(total, group, op=op) if group.size > 1 else total


def install() -> None:
    """Let torch's functions meet shards rightly; once, when the layers are imported."""
    _wrapped.cell_contents = total_norm


install()
