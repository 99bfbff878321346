"""Torch's optimizers and gradient scalers, where a parameter is a shard of the dense one.

A scaler skips a step where a gradient is not finite. Each rank sees its own shards' gradients, so what
torch's ``GradScaler`` finds is joined over all ranks that train one model before it decides.

An optimizer that works element by element does on a shard what it does on the whole. One that looks at
rows, columns or matrices (Adafactor, Muon, Shampoo, LAMB, LBFGS) does not, and is refused by name at its
first step. Torch's own elementwise ones are known; any other is tried on a small parameter, whole and in
halves.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.group import Group
from pyparallel.layers.living import add_optimizer, living_modules
from pyparallel.layers.parameters import ShardedModule
from pyparallel.mesh import mesh_of

ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in (
        "ASGD",
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
        "SparseAdam",
    )
)
# A tried parameter is as the model's, up to so many rows and columns: statistics may begin at a size.
TRIED_SIZE = 256

_checked: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
_trying = False


def _held(optimizer: Optimizer) -> Iterator[tuple[ShardedModule, str, nn.Parameter, int]]:
    """The optimizer's parameters that are in sharded modules, with their places in its groups."""
    places = {
        id(parameter): index
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    for module in living_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in places:
                yield module, name, parameter, places[id(parameter)]


def ranks_of(optimizer: Optimizer) -> list[Group]:
    """The groups of ranks over which the optimizer's parameters are cut, or that share its steps."""
    found: dict[int, Group] = {}
    for module, *_ in _held(optimizer):
        mesh = mesh_of(module.group)
        group = module.group if mesh is None else mesh.world
        if group.size > 1:
            found[group.handle] = group
    return [found[handle] for handle in sorted(found)]


_unscale = torch.amp.GradScaler._unscale_grads_


def _unscale_over_ranks(
    self: torch.amp.GradScaler,
    optimizer: Optimizer,
    inv_scale: Tensor,
    found_inf: Tensor,
    allow_fp16: bool,
) -> dict[torch.device, Tensor]:
    """Torch's own, and what any rank has found."""
    found = _unscale(self, optimizer, inv_scale, found_inf, allow_fp16)
    groups = ranks_of(optimizer)
    if not groups:
        return found
    # A rank without gradients takes part with nothing found.
    found = found or {found_inf.device: found_inf}
    first = next(iter(found.values()))
    worst = torch.stack([value.to(first.device).reshape(()) for value in found.values()]).amax()
    for group in groups:
        worst = all_reduce_raw(worst.reshape(1), group, op="max").reshape(())
    for value in found.values():
        value.fill_(worst.to(value.device))
    return found


def check_optimizer(optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
    """Before a step: raise where the optimizer would do another thing to a shard than to the whole.

    Raises:
        ValueError: it names the optimizer and the parameter.
    """
    if _trying:
        return
    add_optimizer(optimizer)
    if type(optimizer) in ELEMENTWISE:
        return
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if _checked.get(optimizer) == count:
        return
    tried: set[tuple[int, int]] = set()
    for module, name, parameter, place in _held(optimizer):
        mesh = mesh_of(module.group)
        cut = module.group.size > 1 and module.shardings[name].dim is not None
        if not cut and (mesh is None or mesh.pp.size == 1):
            continue
        shape = module.dense_shapes[name]
        if (place, len(shape)) in tried:
            continue
        tried.add((place, len(shape)))
        why = _why_not(optimizer, optimizer.param_groups[place], parameter, shape)
        if why is not None:
            raise ValueError(
                f"{type(optimizer).__name__}: expected an optimizer that works element by element, "
                f"since the model is cut and {type(module).__name__}.{name} {shape} lies on several "
                f"ranks; this one {why}. Use AdamW, SGD or another elementwise one, or an uncut model"
            )
    _checked[optimizer] = count


def _why_not(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, shape: tuple[int, ...]
) -> str | None:
    """Why shards would be stepped in another way than the whole, or None."""
    sizes = [max(2, min(size, TRIED_SIZE) // 2 * 2) for size in shape]
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        value = torch.randn(sizes, generator=generator).to(parameter.device)
        # Halves of other sizes, along every axis.
        for dim, size in enumerate(sizes):
            value.narrow(dim, size // 2, size // 2).mul_(3.0)
        return value

    values = [drawn(), drawn()]
    gradients = [[drawn(), drawn()] for _ in range(3)]
    try:
        whole = _stepped(optimizer, group, values, gradients)
        for dim, size in enumerate(sizes):
            halves = [
                _stepped(
                    optimizer,
                    group,
                    [v.narrow(dim, start, size // 2) for v in values],
                    [[g.narrow(dim, start, size // 2) for g in step] for step in gradients],
                )
                for start in (0, size // 2)
            ]
            joined = [torch.cat(parts, dim) for parts in zip(*halves, strict=True)]
            if not _alike(values, whole, joined):
                return "looks at more than one element at a time"
        alone = [
            _stepped(optimizer, group, [values[i]], [[step[i]] for step in gradients])[0]
            for i in range(2)
        ]
    except Exception as error:
        told = str(error).splitlines()[0] if str(error) else ""
        return f"could not be tried on a part of one ({type(error).__name__}: {told})"
    return None if _alike(values, whole, alone) else "looks at all parameters at once"


def _stepped(
    optimizer: Optimizer,
    group: dict[str, Any],
    values: list[Tensor],
    gradients: list[list[Tensor]],
) -> list[Tensor]:
    """What the optimizer makes of fresh parameters; its own state is left alone."""
    global _trying
    twin = type(optimizer).__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    parameters = [nn.Parameter(value.clone()) for value in values]
    rate = group.get("lr")
    options = {name: v.clone() if isinstance(v, Tensor) else v for name, v in group.items()}
    # A warm-up begins at no step at all.
    if rate is not None and float(rate) == 0.0:
        options["lr"] = 0.01
    twin.param_groups = [{**options, "params": parameters}]
    twin.state = defaultdict(dict)
    _trying = True
    try:
        with torch.random.fork_rng(devices=[]):
            for step in gradients:
                for parameter, gradient in zip(parameters, step, strict=True):
                    parameter.grad = gradient.clone()
                twin.step()
    finally:
        _trying = False
    return [parameter.detach() for parameter in parameters]


def _alike(before: list[Tensor], whole: list[Tensor], parts: list[Tensor]) -> bool:
    moved = max(float((w - b).abs().max()) for w, b in zip(whole, before, strict=True))
    apart = max(float((w - p).abs().max()) for w, p in zip(whole, parts, strict=True))
    return apart <= 1e-3 * moved + 1e-7


def install() -> None:
    """Let torch's scaler and optimizers meet shards rightly; once, when the layers are imported."""
    if torch.amp.GradScaler._unscale_grads_ is not _unscale_over_ranks:
        torch.amp.GradScaler._unscale_grads_ = _unscale_over_ranks
        register_optimizer_step_pre_hook(check_optimizer)


install()
