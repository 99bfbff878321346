"""Which modules of a model are cut, and in which roles: a plan, matched with the model's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from pyparallel.models.swap.plans import (
    PLANS,
    SHARED_ON_SHARDS,
    STYLES,
    Plan,
    generic,
    matches,
    parent_of,
)

_QKV = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


@dataclass(frozen=True)
class Attention:
    """One attention module of a model.

    Attributes:
        core: its name. projections: full names and roles. out: the output projection's name.
        head_dim: D.
        reads_config: its forward takes head counts from its config.
    """

    core: str
    projections: Mapping[str, str]
    out: str
    head_dim: int
    reads_config: bool = False


@dataclass(frozen=True)
class Roles:
    """All attention modules, and every other module's role by its name."""

    attentions: tuple[Attention, ...]
    layers: dict[str, str]


def roles_of(model: nn.Module) -> Roles:
    """The roles of ``model``'s modules, by our plan for its type, else by the one its config ships.

    Raises:
        ValueError: there is no plan, or it can't be followed; the message names the first module.
    """
    model_type = model.config.model_type
    if model_type in PLANS:
        roles = _by_family(model, PLANS[model_type])
    else:
        shipped = dict(getattr(model, "tp_plan", None) or {})
        # The LM head and the embedding have an entry even where the layers have none.
        if not any("*" in name for name in shipped):
            covered = ", ".join(sorted(name.rpartition(".")[2] for name in shipped))
            why = f"its base_model_tp_plan covers {covered} alone" if shipped else "it ships none"
            raise ValueError(
                f"parallelize: no plan for the layers of model type {model_type!r} "
                f"({type(model).__name__}): {why}; first module without one: {_first_matrix(model)}; "
                f"supported: {', '.join(sorted(PLANS))}, and every type whose config ships a "
                f"base_model_tp_plan for its layers"
            )
        roles = _by_shipped_plan(model, shipped)
    if not roles.attentions and not roles.layers:
        names = (
            [kind.core for kind in PLANS[model_type].attentions] if model_type in PLANS else shipped
        )
        raise ValueError(
            f"parallelize: cut no layer of a {type(model).__name__}: of the plan for model type "
            f"{model_type!r} it has none ({', '.join(list(names)[:3])}, ...); give the transformers "
            f"model itself, and not what holds it"
        )
    _share_the_rest(model, roles)
    return roles


def _by_family(model: nn.Module, plan: Plan) -> Roles:
    modules = dict(model.named_modules())
    attentions, layers = [], {}
    for name, module in modules.items():
        for kind in plan.attentions:
            if matches(name, kind.core):
                projections = {f"{name}.{leaf}": role for leaf, role in kind.projections.items()}
                out = f"{parent_of(name)}.{kind.out}"
                for wanted in (*projections, out):
                    if wanted not in modules:
                        raise ValueError(f"{wanted}: expected by the plan of {name}, not found")
                head_dim = getattr(module, kind.head_dim)
                attentions.append(Attention(name, projections, out, head_dim, kind.reads_config))
        for pattern, role in plan.layers.items():
            if matches(name, pattern):
                layers[name] = role
    return Roles(tuple(attentions), layers)


def _by_shipped_plan(model: nn.Module, shipped: Mapping[str, str]) -> Roles:
    for name, _ in model.named_parameters():
        if STYLES.get(shipped.get(generic(name), "replicate")) != "replicated":
            raise ValueError(
                f"{name}: the plan cuts this bare parameter ({shipped[generic(name)]!r}); only whole "
                f"modules can be cut"
            )
    layers: dict[str, str] = {}
    for name, _ in model.named_modules():
        style = shipped.get(generic(name))
        if style is None:
            continue
        if style not in STYLES:
            raise ValueError(
                f"{name}: the plan's style {style!r} can't be followed; supported: "
                f"{', '.join(sorted(STYLES))}"
            )
        layers[name] = STYLES[style]
    cores = {
        parent_of(name)
        for name, role in layers.items()
        if role == "column" and name.rpartition(".")[2] in _QKV
    }
    inside: dict[str, dict[str, str]] = {core: {} for core in cores}
    for name, role in layers.items():
        if (core := parent_of(name)) in cores:
            inside[core][name] = role
    attentions = tuple(
        _shipped_attention(model, core, inside[core], layers) for core in sorted(cores)
    )
    for name, role in layers.items():
        if role == "column" and any(
            "attn" in part or "attention" in part for part in name.split(".")
        ):
            raise ValueError(
                f"{name}: cut by its plan, but not a projection of heads that is known here "
                f"({', '.join(_QKV)} beside one row-wise output)"
            )
    return Roles(attentions, layers)


def _shipped_attention(
    model: nn.Module, core: str, inside: Mapping[str, str], layers: dict[str, str]
) -> Attention:
    """The attention module ``core`` of the roles ``inside`` it, which move out of ``layers``."""
    projections = {
        name: _QKV.get(name.rpartition(".")[2], "query")
        for name, role in inside.items()
        if role == "column"
    }
    outs = [name for name, role in inside.items() if role == "row"]
    roles = sorted(projections.values())
    if len(outs) != 1 or "query" not in roles or "key" not in roles:
        raise ValueError(
            f"{core}: expected column-wise q_proj and k_proj and one row-wise output in its plan, "
            f"got {', '.join(f'{name}: {role}' for name, role in inside.items())}"
        )
    head_dim = getattr(model.get_submodule(core), "head_dim", None)
    if not isinstance(head_dim, int):
        raise ValueError(f"{core}: expected a whole head_dim, got {head_dim!r}")
    for name in (*projections, *outs):
        del layers[name]
    return Attention(core, projections, outs[0], head_dim)


def _share_the_rest(model: nn.Module, roles: Roles) -> None:
    """Give a role to what else has parameters where activations are shards, or raise."""
    cores = {attention.core: attention for attention in roles.attentions}
    covered = set(roles.layers)
    for attention in roles.attentions:
        covered |= {*attention.projections, attention.out}
    places = [*cores]
    for name, role in roles.layers.items():
        if role in ("column", "gate up") and parent_of(name):
            places.append(parent_of(name))
    for place in dict.fromkeys(places):
        for name, module in model.get_submodule(place).named_modules(prefix=place):
            own = dict(module.named_parameters(recurse=False))
            # A parametrized module is refused by its own name, where it is to be replaced.
            if not own or name.partition(".parametrizations")[0] in covered:
                continue
            known = name.rpartition(".")[2] in SHARED_ON_SHARDS
            if known and place in cores:
                known = all(p.shape == (cores[place].head_dim,) for p in own.values())
            if not known:
                shapes = ", ".join(f"{leaf} {tuple(p.shape)}" for leaf, p in own.items())
                raise ValueError(
                    f"{name} ({type(module).__name__}): no plan for its parameters ({shapes}), "
                    f"which work on activations that are cut"
                )
            roles.layers[name] = "shared on heads"


def _first_matrix(model: nn.Module) -> str:
    """The first layer's first module with a matrix, for a message."""
    rows = [
        (name, module)
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) >= 2
        and not isinstance(module, nn.Embedding)
    ]
    return f"{rows[0][0]!r} ({type(rows[0][1]).__name__})" if rows else "none has a matrix"
