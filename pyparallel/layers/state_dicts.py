"""What torch.distributed.checkpoint is given of a module that is cut: shards, told as such, or refused.

``state_dict()`` of a sharded module has this rank's shards, as plain tensors under the dense tensors'
names. torch's checkpoints take such tensors to be the same on all ranks, and would keep one rank's. So
``dcp.save`` and ``dcp.load`` are handed them as boxes of the dense tensors
(:mod:`pyparallel.layers.dense_shards`), what an optimizer keeps of them too, and a checkpoint has dense
tensors, which any mesh loads. What can't be told so is refused by name: copies for ``async_save``; what
FSDP has cut once more; an optimizer's numbered states over the stages of a pipeline; helpers that make
whole tensors (``full_state_dict``, ``cpu_offload``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pyparallel.layers.find_shards import Shard, find_shards, is_dtensor
from pyparallel.layers.living import living_modules

SAVE = "use pyparallel.save(model, folder, mesh, optimizer=optimizer)"
RESTORE = "use pyparallel.restore(model, folder, mesh, optimizer=optimizer)"


@functools.cache
def teach_checkpoints() -> None:
    """Let torch's checkpoints and their helpers know shards; their modules are imported."""
    from torch.distributed.checkpoint import state_dict as helpers
    from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

    # The functions that all public ones call, so that it doesn't matter who imported those, and when.
    gather = state_dict_saver._stateful_to_state_dict
    verify = helpers._verify_options

    @functools.wraps(gather)
    def gathered(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        return _told(gather(state_dict), "dcp.save", SAVE)

    state_dict_saver._stateful_to_state_dict = gathered
    state_dict_saver._save_state_dict = _telling(
        state_dict_saver._save_state_dict, "dcp.save", SAVE
    )
    state_dict_loader._load_state_dict = _telling(
        state_dict_loader._load_state_dict, "dcp.load", RESTORE
    )

    @functools.wraps(verify)
    def verified(model: nn.Module, *args: Any, options: Any = None, **kwargs: Any) -> Any:
        if options is not None and (options.full_state_dict or options.cpu_offload):
            _check_module(model)
        return verify(model, *args, options=options, **kwargs)

    helpers._verify_options = verified


def _told(state: Mapping[str, Any], what: str, way: str) -> dict[str, Any]:
    """A copy of the containers of ``state``, in which shards say what they are."""
    copied = _copied(state)
    _tell(copied, what, way)
    return copied


def _telling(theirs: Callable[..., Any], what: str, way: str) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def told(state_dict: MutableMapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        with _telling_in(state_dict, what, way):
            return theirs(state_dict, *args, **kwargs)

    return told


Place = tuple[Any, Any, Tensor]


@contextmanager
def _telling_in(state: Any, what: str, way: str) -> Iterator[None]:
    """Inside, the shards in ``state`` say what they are; behind, they are as they were."""
    swapped = _tell(state, what, way)
    try:
        yield
    finally:
        for container, key, tensor in swapped:
            container[key] = tensor


def _tell(state: Any, what: str, way: str) -> list[Place]:
    """Put tensors that say what they are into the places of shards; these, and where they were.

    Raises:
        ValueError: a shard can't be told; the message names it, and ``way``.
    """
    places = list(_places(state, ""))
    shards = find_shards([tensor for *_, tensor in places], of_optimizers=True)
    for (name, container, _, tensor), shard in zip(places, shards, strict=True):
        if shard is not None:
            _check(name, tensor, shard, what, way)
            if shard.is_cut and isinstance(container, tuple):
                raise ValueError(f"{what}: {name}: expected shards in lists, got a tuple; {way}")
    swapped: list[Place] = []
    for (_, container, key, tensor), shard in zip(places, shards, strict=True):
        if shard is not None and shard.is_cut:
            from pyparallel.layers.dense_shards import DenseShard

            container[key] = DenseShard.of(tensor, shard.sharding, shard.group.rank)
            swapped.append((container, key, tensor))
    return swapped


def _check(name: str, tensor: Tensor, shard: Shard, what: str, way: str) -> None:
    part = f"one rank's part of a {shard.label} that is cut over {shard.group.size}"
    why = None
    if shard.is_cut and is_dtensor(tensor):
        why = f"{part}, and that FSDP has cut too"
    elif shard.is_cut and not tensor.is_floating_point():
        why = f"{part}, and rounded for inference"
    elif shard.stages > 1 and re.search(r"(^|\.)state\.\d+\.", name):
        why = f"numbered by its optimizer, and each of {shard.stages} stages numbers its own"
    if why is not None:
        raise ValueError(f"{what}: {name} is {why}; {way}")


def _check_module(model: nn.Module) -> None:
    cut = {id(m) for m in living_modules() if m.group.size > 1}
    for name, module in model.named_modules():
        if id(module) in cut:
            raise ValueError(
                f"torch.distributed.checkpoint.state_dict: expected no full_state_dict or cpu_offload "
                f"of a module that is cut, but {name or type(module).__name__} has shards of a group of "
                f"{module.group.size} ranks; leave the options out for dcp.save, or use pyparallel.save "
                f"and pyparallel.export"
            )


def _copied(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if type(state) is list else state


def _places(state: Any, name: str) -> Iterator[tuple[str, Any, Any, Tensor]]:
    """Where the tensors in nested containers are: name, container, key, tensor."""
    items = state.items() if isinstance(state, Mapping) else enumerate(state)
    for key, value in items:
        inner = f"{name}.{key}" if name else str(key)
        if isinstance(value, Tensor):
            yield inner, state, key, value
        elif isinstance(value, Mapping | list | tuple):
            yield from _places(value, inner)
