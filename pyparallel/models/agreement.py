"""What must be alike on all ranks of a model, compared once: weights when it is cut, inputs when it is
called.

Ranks that part ways give another model's answer without a word. Weights that differ, as those of a head
that was just made do, become the first rank's, as torch's own wrappers make them; inputs that differ are
an error.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pyparallel.comm.collectives import broadcast_raw
from pyparallel.comm.group import Group
from pyparallel.models.head_dropout import share_generator_state

# Elements that are summed at once: their temporaries stay in the cache.
BLOCK = 1 << 18
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)


def checksum(tensor: Tensor) -> Tensor:
    """A number, int64, of a tensor's bits and their order; without waiting for a device."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    rest = data.numel() % 8
    total = torch.full((), tensor.numel(), dtype=torch.int64, device=data.device)
    if rest:
        total = total + (data[-rest:].long() * torch.arange(3, 3 + rest, device=data.device)).sum()
        data = data[:-rest].clone()
    if data.storage_offset() % 8:
        data = data.clone()
    words = data.view(torch.int64)
    weights = torch.arange(min(BLOCK, words.numel()), device=data.device) * 2 + 1
    for start in range(0, words.numel(), BLOCK):
        block = words[start : start + BLOCK]
        # Neighbours get other odd factors, and a block another than the one before.
        total = total * _MIX + (block * weights[: block.numel()]).sum()
    return total


def gathered(numbers: Tensor, group: Group) -> Tensor:
    """All ranks' ``numbers [n]``, [R, n]; not one of the collectives of a model's work."""
    out = torch.empty(group.size, numbers.numel(), dtype=numbers.dtype, device=numbers.device)
    group.communicator.all_gather(out, numbers.contiguous().unsqueeze(0))
    return out


def share_weights(model: nn.Module, groups: Iterable[Group]) -> None:
    """Give all ranks the first one's weights where they differ, and warn of these by name.

    Raises:
        ValueError: the ranks have other parameters than the first one, not other values.
    """
    tensors = {name: t for name, t in (*model.named_parameters(), *model.named_buffers())}
    held = {name: t for name, t in tensors.items() if not t.is_meta and t.numel()}
    for group in groups:
        if group.size == 1:
            continue
        device = next(iter(tensors.values())).device
        device = torch.device("cpu") if device.type == "meta" else device
        described = "\n".join(
            f"{n} {tuple(t.shape)} {t.dtype} {n in held}" for n, t in tensors.items()
        )
        _compare("model", described, "build the same one on each", [group], device)
        if not held:
            continue
        sums = torch.stack([checksum(t).to(device) for t in held.values()])
        everyone = gathered(sums, group)
        other = (everyone != everyone[0]).any(0).tolist()
        names = [name for name, differs in zip(held, other, strict=True) if differs]
        for name in names:
            with torch.no_grad():
                held[name].copy_(broadcast_raw(held[name].detach().clone(), group))
        if names:
            told = ", ".join(names[:3]) + (f" and {len(names) - 3} others" if names[3:] else "")
            warnings.warn(
                f"parallelize: {told} differed between the ranks of {group.communicator.name}; all "
                f"have the first rank's now",
                stacklevel=3,
            )


def check_alike(name: str, value: Any, groups: Iterable[Group], device: torch.device) -> None:
    """Raise where ``value``, anything that prints in full, is another on another rank.

    Raises:
        ValueError: on every rank of the group.
    """
    _compare(name, repr(value), "give every rank the first one's", groups, device)


def _compare(
    name: str, described: str, way: str, groups: Iterable[Group], device: torch.device
) -> None:
    digest = int.from_bytes(hashlib.sha256(described.encode()).digest()[:8], "big", signed=True)
    for group in groups:
        if group.size == 1:
            continue
        digests = gathered(torch.tensor([digest], device=device), group).flatten().tolist()
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise ValueError(
                f"{name}: expected the same on all ranks of {group.communicator.name}, got another on "
                f"{', '.join(map(str, others))} than on 0; {way}"
            )


class FirstCall:
    """The hook that compares the ids and masks of a model's first call."""

    # Not one of its owner's hooks.
    pyparallel_own = True

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups
        self.done = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.done or torch.compiler.is_compiling():
            return
        self.done = True
        compare_inputs((args, kwargs), self.groups)


def compare_inputs(given: Any, groups: Iterable[Group]) -> None:
    """Compare all tensors of whole numbers, ids and masks, in what a model is called with.

    Raises:
        ValueError: they differ; on every rank.
    """
    found = [t for t in _tensors(given) if not (t.is_floating_point() or t.is_meta)]
    if not found:
        return
    device = found[0].device
    described = [(tuple(t.shape), str(t.dtype), int(checksum(t))) for t in found]
    check_alike("inputs", described, groups, device)


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, dict):
        given = list(given.values())
    return [t for part in given for t in _tensors(part)] if isinstance(given, (list, tuple)) else []


class Alike:
    """Mixed into a model's class: transformers' generate() starts alike on all ranks."""

    alike_over: list[Group]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        compare_inputs((args, kwargs), self.alike_over)
        for group in self.alike_over:
            share_generator_state(group, self.device)
        return super().generate(*args, **kwargs)


@cache
def _alike_class(kind: type[nn.Module]) -> type[nn.Module]:
    # The name stays, which transformers knows its classes by.
    return type(kind.__name__, (Alike, kind), {"__module__": kind.__module__})


def keep_alike(model: nn.Module, groups: Iterable[Group]) -> None:
    """From now on compare what ``model`` is given, and let it draw alike on all ranks."""
    several = [group for group in groups if group.size > 1]
    if not several:
        return
    model.register_forward_pre_hook(FirstCall(several), with_kwargs=True)
    if hasattr(model, "generate"):
        model.__class__ = _alike_class(type(model))
        model.alike_over = several
