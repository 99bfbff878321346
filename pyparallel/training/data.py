"""Data parallel: the gradients of replicas that see other tokens, summed by torch's DDP or FSDP2.

Parameters are replicated over dp and over cp, whose ranks see other sequences and other parts of them:

    dw = sum over dp x cp of dw_r,    with a loss  L = sum over dp x cp of L_r

Torch's engines bucket the gradients and start their sums under backward. What is added here: the axis
dp x cp, a sum in the place of torch's mean (a mean over ranks is wrong where they have other numbers of
targets; see :mod:`pyparallel.training.loss`) unless a mean is asked for, and this library's engine under
both, which sums in rank order in fp32 and rounds once. So parameters that are replicated over tp get the
same bits on every rank of it, though the buckets around them, cut over tp, differ.
"""

from __future__ import annotations

import hashlib
import inspect

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pyparallel.comm.collectives import all_gather_raw, broadcast_raw
from pyparallel.comm.group import Group
from pyparallel.mesh import Mesh
from pyparallel.training.data_engines import (
    BucketSums,
    GroupAllGather,
    GroupReduceScatter,
    sum_bucket,
)

ENGINES = ("ddp", "fsdp")

# The newer name of the flag that lets DDP send buffers before each forward.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def data_parallel(
    model: nn.Module,
    mesh: Mesh,
    *,
    engine: str = "ddp",
    average: bool = False,
    bucket_cap_mb: float | None = None,
    find_unused_parameters: bool = False,
    reshard_after_forward: bool = True,
    mp_policy: MixedPrecisionPolicy | None = None,
) -> nn.Module:
    """Let backward sum every gradient over the ranks of dp x cp; a call of all ranks.

    ``model`` is any module: a :class:`Decoder`, a model that :func:`parallelize` has cut, a pipeline's
    stage. Its parameters and buffers become those of the first rank of dp x cp.

    **The gradients are sums, where those of torch's DDP and FSDP2 are means.** So the loss has to be
    this rank's part of all ranks' mean, as :func:`pyparallel.cross_entropy` and
    :func:`pyparallel.mean_loss` give it. A mean of the rank's own tokens, as a training loop for DDP
    has it, gives gradients that are dp times too large; with ``average`` it gives DDP's.

    Args:
        average: divide the sums by dp, for losses that are means over a rank's own sequences; as with
            torch's DDP, not the mean over all tokens where ranks have other numbers of them. Not with
            the losses above, nor under a :class:`pyparallel.Pipeline`, which computes one of them.
        engine: "ddp", every rank holds all of its parameters, gradients and optimizer states; "fsdp",
            FSDP2, it holds 1/(dp cp) of them, and the parameters of a layer are gathered for its
            forward and its backward. Layers are the children of the outermost ``nn.ModuleList``.
        bucket_cap_mb: ddp: how many MB of gradients are summed at once; by default torch's 25.
        find_unused_parameters: ddp: some parameters get no gradient in some steps.
        reshard_after_forward: fsdp: a layer's gathered parameters are freed between its forward and
            its backward.
        mp_policy: fsdp: the dtypes of gathered parameters and of the sums.

    Returns:
        ddp: the model in a ``DistributedDataParallel`` (``.module``, ``.no_sync()``); a model without
        trainable parameters as it is. fsdp: ``model``, changed in place to an ``FSDPModule``
        (``.set_requires_gradient_sync()``), whose parameters are DTensors over ``mesh.data_mesh``.
        FSDP gathers parameters in ``model(...)`` alone, so call the model and not its parts.

    Raises:
        ValueError: an unknown engine or another engine's option; ``average`` over several ranks of cp;
            a model that is wrapped already, is on the meta device, differs between ranks, or ties a
            layer's parameter to one outside of it.
    """
    if average and mesh.cp.size > 1:
        raise ValueError(
            f"average: expected False over cp={mesh.cp.size} ranks, which hold parts of one sequence, "
            f"so that gradients are sums over them; use pyparallel.cross_entropy or mean_loss, which "
            f"divide by all ranks' targets"
        )
    _check(model, engine, bucket_cap_mb, find_unused_parameters, reshard_after_forward, mp_policy)
    group = mesh.data
    _check_alike(model, group)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            first = broadcast_raw(tensor, group, src=0)
            if first is not tensor:
                tensor.copy_(first)
    divisor = mesh.dp.size if average else 1
    if engine == "fsdp":
        policy = mp_policy or MixedPrecisionPolicy()
        return _fsdp(model, mesh, divisor, reshard_after_forward, policy)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    wrapped = DistributedDataParallel(
        model,
        process_group=mesh.data_mesh.get_group(),
        init_sync=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused_parameters,
        bucket_cap_mb=bucket_cap_mb,
        **{_SYNC_BUFFERS: False},
    )
    wrapped.register_comm_hook(BucketSums(group, divisor), sum_bucket)
    wrapped.gradient_divisor = divisor
    return wrapped


def _check(
    model: nn.Module,
    engine: str,
    bucket_cap_mb: float | None,
    find_unused_parameters: bool,
    reshard_after_forward: bool,
    mp_policy: MixedPrecisionPolicy | None,
) -> None:
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    others = {
        "ddp": {
            "reshard_after_forward": not reshard_after_forward,
            "mp_policy": mp_policy is not None,
        },
        "fsdp": {
            "bucket_cap_mb": bucket_cap_mb is not None,
            "find_unused_parameters": find_unused_parameters,
        },
    }
    for option, given in others[engine].items():
        if given:
            raise ValueError(
                f"{option}: expected its default with engine={engine!r}, which has none"
            )
    for module in model.modules():
        if isinstance(module, (DistributedDataParallel, FSDPModule)):
            raise ValueError(
                f"model: expected one that is not data-parallel yet, got a {type(module).__name__}; "
                f"call data_parallel once"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta or isinstance(parameter, DTensor):
            kind = "a parameter without memory" if parameter.is_meta else "a DTensor"
            raise ValueError(f"{name}: expected plain memory, got {kind}; load the weights first")


def _check_alike(model: nn.Module, group: Group) -> None:
    """The ranks have the same parameters; otherwise their sums would wait for one another, or mix."""
    described = "\n".join(
        f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}"
        for name, p in model.named_parameters()
    )
    digest = int.from_bytes(hashlib.sha256(described.encode()).digest()[:8], "big", signed=True)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    digests = all_gather_raw(torch.tensor([digest], device=device), group).tolist()
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        raise ValueError(
            f"model: expected the same parameters on all ranks of dp x cp, got others on "
            f"{', '.join(map(str, others))} than on 0; build the same model on each"
        )


def _fsdp(
    model: nn.Module,
    mesh: Mesh,
    divisor: int,
    reshard_after_forward: bool,
    mp_policy: MixedPrecisionPolicy,
) -> nn.Module:
    layers = _layers(model)
    _check_ties(model, layers)
    for module in (*layers.values(), model):
        fully_shard(
            module,
            mesh=mesh.data_mesh,
            reshard_after_forward=reshard_after_forward and module is not model,
            mp_policy=mp_policy,
        )
        module.set_gradient_divide_factor(float(divisor))
        module.set_force_sum_reduction_for_comms(True)
        module.set_custom_all_gather(GroupAllGather(mesh.data))
        module.set_custom_reduce_scatter(GroupReduceScatter(mesh.data))
    model.gradient_divisor = divisor
    return model


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The children of the outermost module lists, by name."""
    found: dict[str, nn.Module] = {}
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(lists)):
            lists.append(f"{name}.")
            found |= {f"{name}.{child}": layer for child, layer in module.named_children()}
    return found


def _check_ties(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """FSDP gathers a unit at a time, so a parameter has to be in one unit alone."""
    units: dict[int, tuple[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unit = next((layer for layer in layers if name.startswith(f"{layer}.")), "")
        first, other = units.setdefault(id(parameter), (name, unit))
        if other != unit:
            raise ValueError(
                f"{name}: tied to {first}, in another layer, which fsdp gathers apart; use "
                f"engine='ddp'"
            )
