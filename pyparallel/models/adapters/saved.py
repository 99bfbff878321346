"""``PeftModel.save_pretrained`` of a model that is cut: the dense model's adapter file.

A call of all ranks: those of tp join what a file of peft's has, one tensor at a time, those of pp tell
theirs to the first stage, and the world's first rank writes, by peft's own method.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyparallel.checkpoint.format import CheckpointError
from pyparallel.comm.exchange import gather_objects
from pyparallel.comm.peer_watch import naming_lost_peers
from pyparallel.layers.find_shards import is_dtensor
from pyparallel.layers.parameters import ShardedModule
from pyparallel.mesh import Mesh, mesh_of
from pyparallel.models.swap.save_pretrained import (
    agree_on_parts,
    cut_tensors,
    join_parts,
    raise_together,
)

# Where the whole tensors of each adapter are while its file is written.
_JOINED = "_joined_adapters"


def whole_if_joined(theirs: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """peft's ``get_peft_model_state_dict``, which is handed what has been joined."""

    @functools.wraps(theirs)
    def state_dict(
        model: nn.Module, state_dict: Any = None, adapter_name: str = "default", **options: Any
    ) -> dict[str, Any]:
        joined = vars(model).get(_JOINED)
        if joined is not None:
            return joined[adapter_name]
        return theirs(model, state_dict=state_dict, adapter_name=adapter_name, **options)

    return state_dict


def save_whole(theirs: Callable[..., None]) -> Callable[..., None]:
    """peft's ``save_pretrained``, which knows models that are cut."""

    @functools.wraps(theirs)
    def save_pretrained(
        self: nn.Module,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """peft's own; of a cut model a call of all ranks, of which the first one writes.

        Raises:
            CheckpointError: on every rank, if any rank fails.
        """
        mesh = _mesh_of(self)
        if mesh is None:
            given = selected_adapters, save_embedding_layers, is_main_process
            other = path_initial_model_for_weight_conversion
            theirs(self, save_directory, safe_serialization, *given, other, **kwargs)
            return
        if path_initial_model_for_weight_conversion is not None:
            raise CheckpointError(
                "path_initial_model_for_weight_conversion: expected None of a model that is cut; "
                "convert the saved adapter on the dense model"
            )
        state = kwargs.pop("state_dict", None)
        names = selected_adapters or list(self.peft_config)
        joined = _joined(self, mesh, names, state, save_embedding_layers)
        error = None
        if dist.get_rank() == 0:
            setattr(self, _JOINED, joined)
            try:
                theirs(self, save_directory, safe_serialization, names, **kwargs)
            except Exception as caught:
                error = caught
            finally:
                delattr(self, _JOINED)
        raise_together(error and f"{type(error).__name__}: {error}", error)

    return save_pretrained


def _mesh_of(model: nn.Module) -> Mesh | None:
    """The mesh that a model is cut over; None if that is one rank, or the model is not cut."""
    shards = (module for module in model.modules() if isinstance(module, ShardedModule))
    first = next(shards, None)
    mesh = None if first is None else mesh_of(first.group)
    return None if mesh is None or mesh.tp.size == mesh.pp.size == 1 else mesh


def _joined(
    model: nn.Module,
    mesh: Mesh,
    names: list[str],
    state: Mapping[str, Tensor] | None,
    save_embedding_layers: str | bool,
) -> dict[str, dict[str, Tensor]]:
    """What peft's file of each adapter has, on the first rank; a call of all ranks."""
    from peft.utils.save_and_load import get_peft_model_state_dict

    values = dict(model.state_dict() if state is None else state)
    if any(is_dtensor(value) for value in values.values()):
        raise CheckpointError(
            "save_pretrained: expected parameters that are cut over tp and pp alone, but FSDP has cut "
            "them too; use pyparallel.save(model, folder, mesh)"
        )
    cut = cut_tensors(model)
    owner = mesh.tp.rank == mesh.dp.rank == mesh.cp.rank == 0
    # Its own saving runs on numbers that stand for the tensors.
    keys = list(values)
    numbers = {key: torch.tensor(number) for number, key in enumerate(keys)}
    found: dict[str, dict[str, Tensor]] = {}
    for name in names:
        with warnings.catch_warnings():
            # Told once, where it writes.
            warnings.simplefilter("ignore")
            options = {"adapter_name": name, "save_embedding_layers": save_embedding_layers}
            wanted = get_peft_model_state_dict(model, state_dict=numbers, **options)
        held = {key: keys[int(number)] for key, number in wanted.items()}
        needed = {key: values[key] for key in held.values()}
        inside = {key: where for key, where in cut.items() if key in needed}
        parts = agree_on_parts(inside, needed, mesh.device_mesh.get_group("tp"))
        whole = join_parts(inside, needed, parts, keep=owner)
        found[name] = {}
        if whole is not None:
            found[name] = {key: whole[source].detach().cpu() for key, source in held.items()}
    if mesh.pp.size == 1:
        return found
    with naming_lost_peers("save_pretrained"):
        stages = gather_objects(mesh.device_mesh.get_group("pp"), found)
    return {name: {k: v for stage in stages for k, v in stage[name].items()} for name in names}
