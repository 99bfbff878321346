"""What torch.distributed.checkpoint is given of a module that is cut: refused by name.

``state_dict()`` of a sharded module has this rank's shards, as plain tensors under the dense tensors'
names. torch's checkpoints take such tensors to be the same on all ranks and keep one rank's, and its
helpers (``get_model_state_dict`` and the others) hand them out as whole. :func:`pyparallel.save` writes
what loads on any mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyparallel.layers.find_shards import find_shards
from pyparallel.layers.living import living_modules

SAVE = "use pyparallel.save(model, folder, mesh, optimizer=optimizer)"
RESTORE = "use pyparallel.restore(model, folder, mesh, optimizer=optimizer)"


@functools.cache
def refuse_shards() -> None:
    """Let torch's checkpoints and their helpers refuse shards; their modules are imported."""
    from torch.distributed.checkpoint import state_dict as helpers
    from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

    # The functions that all public ones call, so that it doesn't matter who imported those, and when.
    gather = state_dict_saver._stateful_to_state_dict
    save = state_dict_saver._save_state_dict
    read = state_dict_loader._load_state_dict
    verify = helpers._verify_options
    finish = helpers._maybe_full_or_cpu_state_dict

    @functools.wraps(gather)
    def gathered(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        plain = gather(state_dict)
        _check(plain, "dcp.save", SAVE)
        return plain

    state_dict_saver._stateful_to_state_dict = gathered
    state_dict_saver._save_state_dict = _checking_first(save, "dcp.save", SAVE)
    state_dict_loader._load_state_dict = _checking_first(read, "dcp.load", RESTORE)
    helpers._maybe_full_or_cpu_state_dict = _checking_first(finish, "state_dict", SAVE)

    @functools.wraps(verify)
    def verified(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _check_module(model)
        return verify(model, *args, **kwargs)

    helpers._verify_options = verified


def _checking_first(theirs: Callable[..., Any], what: str, way: str) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def checked(state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        _check(state_dict, what, way)
        return theirs(state_dict, *args, **kwargs)

    return checked


def _check(state: Any, what: str, way: str) -> None:
    """Raise where a tensor in ``state`` is a shard."""
    named = list(_tensors(state, ""))
    shards = find_shards([tensor for _, tensor in named], of_optimizers=True)
    for (name, _), shard in zip(named, shards, strict=True):
        if shard is not None and shard.is_cut:
            raise ValueError(
                f"{what}: expected dense tensors or DTensors, but {name} is one rank's part of a "
                f"{shard.label} that is cut over {shard.group.size}; {way}"
            )


def _check_module(model: nn.Module) -> None:
    cut = {id(m) for m in living_modules() if m.group.size > 1}
    for name, module in model.named_modules():
        if id(module) in cut:
            raise ValueError(
                f"torch.distributed.checkpoint.state_dict: expected a module that is not cut, or by "
                f"FSDP alone, but {name or type(module).__name__} has shards of a group of "
                f"{module.group.size} ranks; use pyparallel.save and pyparallel.restore"
            )


def _tensors(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, list | tuple):
        for number, value in enumerate(state):
            yield from _tensors(value, f"{name}.{number}")
