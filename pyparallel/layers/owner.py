"""What a dense module's owner wants of it: a twin keeps it, or one line says that it can't.

``requires_grad``, dtype, device and training mode go over to the twin. Hooks see whole tensors and a
twin has shards, so they are refused, as is whatever makes a parameter from others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Where torch keeps a module's hooks, and what they are called.
HOOKS = {
    "_forward_pre_hooks": "forward pre-hooks",
    "_forward_hooks": "forward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
    "_backward_hooks": "backward hooks",
    "_state_dict_pre_hooks": "state-dict pre-hooks",
    "_state_dict_hooks": "state-dict hooks",
    "_load_state_dict_pre_hooks": "load-state-dict pre-hooks",
    "_load_state_dict_post_hooks": "load-state-dict post-hooks",
}


def hooks_of(module: nn.Module) -> list[str]:
    """The kinds of hooks that ``module`` has."""
    return [kind for place, kind in HOOKS.items() if getattr(module, place, None)]


def is_touched(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward: hooks, or another forward."""
    return bool(hooks_of(module)) or "forward" in vars(module)


def check_replaceable(module: nn.Module, name: str | None = None) -> None:
    """Raise where a twin of ``module`` would lose something that its owner has added.

    Raises:
        ValueError: hooks, a forward or a parameter that is not the class's own; the message names it.
    """
    what = type(module).__name__ if name is None else name
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)
        raise ValueError(
            f"{what}: {names} is parametrized, which a shard can't be; call "
            f"torch.nn.utils.parametrize.remove_parametrizations first"
        )
    kinds = hooks_of(module)
    if kinds:
        owners = [
            type(hook).__name__
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            if isinstance(hook, nn.Module) or type(hook).__module__.startswith("torch.")
        ]
        raise ValueError(
            f"{what}: has {' and '.join(kinds)}{''.join(f' ({owner})' for owner in owners)}, which "
            f"would be lost; add them afterwards"
        )
    if "forward" in vars(module):
        raise ValueError(
            f"{what}: its forward was replaced on this one module, which would be lost; take that back"
        )
    for leaf, parameter in module.named_parameters(recurse=False):
        if type(parameter) not in (nn.Parameter, Tensor):
            raise ValueError(
                f"{what}.{leaf}: expected a plain parameter, got a {type(parameter).__name__}; cut the "
                f"model before anything else wraps or quantizes it"
            )
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{what}.{leaf}: has gradient hooks, which would be lost; add them afterwards"
            )


def join_dense(parts: Sequence[nn.Module], names: Sequence[str]) -> dict[str, Tensor]:
    """The parameters of several linear modules, one after another along axis 0.

    Raises:
        ValueError: as :func:`check_replaceable`; some are frozen and others not, or have no bias.
    """
    joined: dict[str, Tensor] = {}
    for part, name in zip(parts, names, strict=True):
        check_replaceable(part, name)
    for kind in ("weight", "bias"):
        held = [getattr(part, kind) for part in parts]
        if all(parameter is None for parameter in held):
            continue
        for what, states, way in (
            (
                "bias",
                [p is not None for p in held],
                "give all a bias, of zeros where they had none",
            ),
            (
                "requires_grad",
                [p is not None and p.requires_grad for p in held],
                "freeze all, or none",
            ),
            ("dtype", [None if p is None else p.dtype for p in held], "cast them to one"),
        ):
            if len(set(states)) > 1:
                told = ", ".join(f"{n}: {s}" for n, s in zip(names, states, strict=True))
                raise ValueError(
                    f"{kind}: expected one {what} of all that become one parameter, got {told}; {way}"
                )
        value = torch.cat([parameter.detach() for parameter in held])
        joined[kind] = nn.Parameter(value, requires_grad=held[0].requires_grad)
    return joined
