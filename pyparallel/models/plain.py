"""Whether a decoder is still the one that its config describes.

The whole decoder in C++ knows its layers by what they were built as. A module with hooks, another in a
module's place, a changed number, or a method replaced on an object or a class make it another model:
the modules then run themselves.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Size, nn
from torch.nn.modules import module as torch_module

from pyparallel.layers.owner import hooks_of
from pyparallel.models.decoder import Decoder
from pyparallel.models.decoder_layer import DecoderLayer

# What instances of one config may differ in, or carry beside it.
_FREE = {
    "generation",
    "replica",
    "training",
    "weight_kind",
    "_dtype",
    "loaded_from",
    "pipeline",
    "tied_copies",
    "frequencies",
}
_SIMPLE = (int, float, str, bool, tuple, type(None))
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")

_built: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, Any]]] = (
    weakref.WeakKeyDictionary()
)
# The methods of each class as it was first seen, which is when its module was imported.
_methods: dict[type, dict[str, Any]] = {}


def unlike_plain(model: Decoder) -> str | None:
    """What makes ``model`` another than its config says, in a few words; or None."""
    if any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS):
        return "hooks on all modules run with it"
    wanted = _described(model)
    ours = dict(model.named_modules())
    if ours.keys() != wanted.keys():
        name = min(ours.keys() ^ wanted.keys())
        return f"{name or 'it'} is not what its config describes"
    for kind in {type(module) for module in ours.values()}:
        if kind in _methods and _methods_of(kind) != _methods[kind]:
            return f"a method of {kind.__name__} was replaced"
    for name, module in ours.items():
        plain, what = wanted[name], name or "it"
        if type(module) is not plain.kind:
            return f"{what} is a {type(module).__name__}, expected {plain.kind.__name__}"
        kinds = hooks_of(module)
        if kinds:
            return f"{what} has {kinds[0]}"
        changed = _changed(module, plain)
        if changed is not None:
            return f"{what}.{changed} is not what its config describes"
    return None


@dataclass(frozen=True)
class _Described:
    """One module as its config has it: plain values, other attributes' names, parameters' shapes."""

    kind: type[nn.Module]
    values: dict[str, Any]
    others: frozenset[str]
    shapes: dict[str, Size | None]


def _described(model: Decoder) -> dict[str, _Described]:
    """The modules of the model that the config describes."""
    known = _built.get(model)
    if known is None or known[0] is not model.config:
        twin = model.meta_twin()
        known = _built[model] = model.config, {n: _describe(m) for n, m in twin.named_modules()}
    return known[1]


def _describe(module: nn.Module) -> _Described:
    held = {name: value for name, value in vars(module).items() if name not in _FREE}
    values = {name: value for name, value in held.items() if isinstance(value, _SIMPLE)}
    shapes = {name: None if p is None else p.shape for name, p in module._parameters.items()}
    return _Described(type(module), values, frozenset(held.keys() - values.keys()), shapes)


def _changed(module: nn.Module, plain: _Described) -> str | None:
    """The name of an attribute or a parameter that differs."""
    ours, kind = vars(module), type(module)
    for name, value in plain.values.items():
        if name not in ours or ours[name] != value:
            return name
    for name in ours.keys() - plain.values.keys() - plain.others - _FREE:
        if callable(ours[name]) and hasattr(kind, name):
            return name
    if any(isinstance(ours.get(name), _SIMPLE) for name in plain.others):
        return next(name for name in plain.others if isinstance(ours.get(name), _SIMPLE))
    held = module._parameters
    if held.keys() != plain.shapes.keys():
        return min(held.keys() ^ plain.shapes.keys())
    packed = getattr(module, "weight_kind", None) is not None
    for name, parameter in held.items():
        shape = plain.shapes[name]
        if (parameter is None) != (shape is None):
            return name
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            return name
        if parameter.shape != shape and not (packed and name == "weight"):
            return name
    return None


def _methods_of(kind: type) -> dict[str, Any]:
    return {
        name: value
        for base in reversed(kind.__mro__[: kind.__mro__.index(nn.Module)])
        for name, value in vars(base).items()
        if callable(value) or isinstance(value, property)
    }


def _remember(kind: type) -> None:
    _methods[kind] = _methods_of(kind)


def _classes() -> list[type]:
    from pyparallel import layers
    from pyparallel.layers.norm import HeadRMSNorm
    from pyparallel.models.stage import Layers

    named = [getattr(layers, name) for name in layers.__all__]
    return [Decoder, DecoderLayer, HeadRMSNorm, Layers, nn.Embedding, *named]


for _kind in _classes():
    _remember(_kind)
