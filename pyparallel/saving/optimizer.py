"""An optimizer's state beside its parameters: tensors cut as they are, counters and options as JSON.

Everything is kept by the names of dense tensors, not by the order of parameters, so that it follows each
parameter to another mesh, to another split into parameters (a fused QKV projection or three), or to
another stage of a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyparallel.checkpoint.format import CheckpointError
from pyparallel.checkpoint.sharded import OPTIMIZER, Index
from pyparallel.checkpoint.state import TENSOR
from pyparallel.mesh import Mesh
from pyparallel.saving.names import Named
from pyparallel.saving.pieces import Piece, pieces_of

Optimizer = torch.optim.Optimizer


def optimizer_pieces(
    optimizer: Optimizer, named: list[Named], mesh: Mesh
) -> tuple[list[Piece], dict[str, Any]]:
    """The pieces that this rank may write, and the rest of the state as JSON.

    Raises:
        ValueError: the optimizer has a parameter that is none of the model's, or a state that is
            neither cut as its parameter nor a single number.
    """
    pieces: list[Piece] = []
    state: dict[str, dict[str, Any]] = {}
    groups = []
    for group, members in _members(optimizer, named):
        names = [source.name for member in members for source in member.found]
        groups.append({"options": _options(group), "names": names})
        for member in members:
            numbers = {}
            for key, value in optimizer.state.get(member.value, {}).items():
                if isinstance(value, Tensor) and value.shape == member.value.shape:
                    numbers[key] = TENSOR
                    if not member.copied:
                        pieces += pieces_of(
                            value, member.found, mesh.tp.rank, owned=True, prefix=_prefix(key)
                        )
                else:
                    numbers[key] = _number(f"{member.found[0].name}: state {key}", value)
            state.update({source.name: numbers for source in member.found})
    return pieces, {"groups": groups, "state": state}


def merge_optimizers(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One JSON object of all ranks', which hold different parameters along a pipeline."""
    groups: list[dict[str, Any]] = []
    state: dict[str, Any] = {}
    for part in states:
        for number, group in enumerate(part["groups"]):
            if number == len(groups):
                groups.append({"options": group["options"], "names": []})
            groups[number]["names"] += group["names"]
        state.update(part["state"])
    for group in groups:
        group["names"] = sorted(set(group["names"]))
    return {"groups": groups, "state": state}


def empty_optimizer(
    optimizer: Optimizer, named: list[Named], index: Index, mesh: Mesh, what: str
) -> tuple[dict[str, Any], list[Piece]]:
    """A state dict for ``optimizer.load_state_dict``, and the pieces that are still to be read into it.

    Raises:
        CheckpointError: there is no optimizer in the checkpoint, or it lacks one of these parameters, or
            grouped them in another way.
    """
    saved = index.state.get("optimizer")
    if saved is None:
        raise CheckpointError(f"{what}: it was saved without an optimizer")
    group_of = {name: i for i, group in enumerate(saved["groups"]) for name in group["names"]}
    state: dict[int, dict[str, Any]] = {}
    groups, pieces = [], []
    for group, members in _members(optimizer, named):
        numbers: set[int] = set()
        positions = []
        for member in members:
            names = [source.name for source in member.found]
            lost = [name for name in names if name not in group_of]
            if lost:
                raise CheckpointError(f"{what}: its optimizer has no parameter {lost[0]}")
            numbers |= {group_of[name] for name in names}
            position = len(state)
            positions.append(position)
            state[position] = {}
            for key, value in _common(saved["state"], names, what).items():
                if value == TENSOR:
                    stored = index.tensors.get(_prefix(key) + names[0])
                    if stored is None:
                        raise CheckpointError(f"{what}: tensor {_prefix(key)}{names[0]} is missing")
                    held = optimizer.state.get(member.value, {}).get(key)
                    value = _room(held, member.value, stored.dtype)
                    pieces += pieces_of(
                        value, member.found, mesh.tp.rank, owned=False, prefix=_prefix(key)
                    )
                elif isinstance(value, dict):
                    value = torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]))
                state[position][key] = value
        if len(numbers) > 1:
            raise CheckpointError(
                f"{what}: parameters of one group of this optimizer were in groups "
                f"{sorted(numbers)} of the saved one; group them as they were"
            )
        options = saved["groups"][numbers.pop()]["options"] if numbers else {}
        own = {key: value for key, value in group.items() if key != "params"}
        own |= {
            key: _alike(key, own[key], value, what) for key, value in options.items() if key in own
        }
        groups.append({**own, "params": positions})
    return {"state": state, "param_groups": groups}, pieces


def _members(
    optimizer: Optimizer, named: list[Named]
) -> Iterable[tuple[dict[str, Any], list[Named]]]:
    """Each group with its parameters as the checkpoint knows them."""
    known = {id(member.value): member for member in named}
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                raise ValueError(
                    f"optimizer: parameter {place} of group {number}, of shape "
                    f"{tuple(parameter.shape)}, is none of the model's; make the optimizer after "
                    f"the model is cut and wrapped"
                )
        yield group, [known[id(parameter)] for parameter in group["params"]]


def _prefix(key: str) -> str:
    return f"{OPTIMIZER}{key}/"


def _common(state: Mapping[str, Any], names: list[str], what: str) -> Mapping[str, Any]:
    """The state of a parameter that is made of several tensors: they have to agree."""
    first = state.get(names[0], {})
    for name in names[1:]:
        if state.get(name, {}) != first:
            raise CheckpointError(
                f"{what}: {names[0]} and {name} are one parameter here, but their optimizer states "
                f"differ: {first} and {state.get(name, {})}"
            )
    return first


def _room(held: Any, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """What the optimizer has already, where that fits, so that nothing is held twice."""
    if isinstance(held, Tensor) and held.shape == parameter.shape and held.dtype == dtype:
        return held
    return torch.empty_like(parameter, dtype=dtype, requires_grad=False)


def _number(what: str, value: Any) -> Any:
    """A single number, or None, as JSON."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return {"dtype": str(value.dtype).removeprefix("torch."), "value": value.item()}
    if value is None or isinstance(value, (bool, int, float)):
        return value
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    raise ValueError(
        f"{what}: expected a number, or a tensor of its parameter's shape; got a "
        f"{type(value).__name__}{shape}, which can't be cut for another mesh"
    )


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


def _alike(key: str, current: Any, saved: Any, what: str) -> Any:
    """A saved option as the kind that the optimizer has now."""
    is_number = isinstance(current, int | float | Tensor) and not isinstance(current, bool)
    if is_number and not isinstance(saved, bool | int | float):
        raise CheckpointError(
            f"{what}: its optimizer's {key}: expected a number, got {saved!r}; it is of another "
            f"optimizer, or damaged"
        )
    if isinstance(current, Tensor):
        return torch.full_like(current, saved)
    return tuple(saved) if isinstance(saved, list) and isinstance(current, tuple) else saved
