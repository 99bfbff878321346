"""Whether a decoder is still the one that its config describes.

The whole decoder in C++ knows its layers by what they were built as. A module with hooks, another in a
module's place, a changed number, or a method replaced on an object or a class make it another model:
the modules then run themselves.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
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

_built: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Decoder]] = weakref.WeakKeyDictionary()
# The methods of each class as it was first seen, which is when its module was imported.
_methods: dict[type, dict[str, Any]] = {}


def unlike_plain(model: Decoder) -> str | None:
    """What makes ``model`` another than its config says, in a few words; or None."""
    if any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS):
        return "hooks on all modules run with it"
    twin = _twin(model)
    ours, theirs = dict(model.named_modules()), dict(twin.named_modules())
    if ours.keys() != theirs.keys():
        name = min(ours.keys() ^ theirs.keys())
        return f"{name or 'it'} is not what its config describes"
    for kind in {type(module) for module in ours.values()}:
        if kind in _methods and _methods_of(kind) != _methods[kind]:
            return f"a method of {kind.__name__} was replaced"
    for name, module in ours.items():
        plain, what = theirs[name], name or "it"
        if type(module) is not type(plain):
            return f"{what} is a {type(module).__name__}, expected {type(plain).__name__}"
        kinds = hooks_of(module)
        if kinds:
            return f"{what} has {kinds[0]}"
        changed = _changed(module, plain)
        if changed is not None:
            return f"{what}.{changed} is not what its config describes"
    return None


def _twin(model: Decoder) -> Decoder:
    """The model that the config describes, without memory."""
    known = _built.get(model)
    if known is None or known[0] is not model.config:
        twin = type(model)(
            model.config,
            "meta",
            group=model.group,
            stage=model.stage,
            sequence_parallel=model.sequence_parallel,
            recompute=model.recompute,
        )
        known = _built[model] = model.config, twin
    return known[1]


def _changed(module: nn.Module, plain: nn.Module) -> str | None:
    """The name of an attribute or a parameter that differs."""
    ours, theirs = vars(module), vars(plain)
    for name, value in ours.items():
        if name in theirs:
            simple = isinstance(theirs[name], _SIMPLE) or isinstance(value, _SIMPLE)
            if simple and name not in _FREE and value != theirs[name]:
                return name
        elif name not in _FREE and hasattr(type(module), name) and callable(value):
            return name
    held, wanted = module._parameters, plain._parameters
    if held.keys() != wanted.keys():
        return min(held.keys() ^ wanted.keys())
    for name, parameter in held.items():
        if (parameter is None) != (wanted[name] is None):
            return name
        if parameter is None:
            continue
        packed = getattr(module, "weight_kind", None) is not None and name == "weight"
        if type(parameter) is not nn.Parameter or (
            not packed and parameter.shape != wanted[name].shape
        ):
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
