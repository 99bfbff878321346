"""The cut of every module of a model: its role, worked out for the ranks, before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from pyparallel.comm.group import Group
from pyparallel.cut.shard import HeadLayout, Sharding, features, fuse
from pyparallel.layers.owner import check_replaceable
from pyparallel.layers.vocab_parallel_embedding import vocab_sharding
from pyparallel.models.swap.roles import Attention, Roles, roles_of

_COLUMN, _ROW = "column", "row"


@dataclass(frozen=True)
class Cut:
    """How one module is replaced.

    Attributes:
        kind: "column", "row", "embedding", "lm head" or "shared" (replicated, its gradient summed).
        sharding: the ranges of the axis that is cut.
        whole: column: gather the output; row: the input is whole and is cut there.
        replicas: as :class:`ColumnParallelLinear` takes them.
    """

    kind: str
    sharding: Sharding | None = None
    whole: bool = False
    replicas: tuple[int, Sharding] | None = None


@dataclass(frozen=True)
class AttentionCut:
    """One attention module and which of its heads each rank holds."""

    attention: Attention
    layout: HeadLayout


@dataclass(frozen=True)
class Cuts:
    """Everything that changes: modules by their names, and the attention modules."""

    modules: dict[str, Cut]
    attentions: list[AttentionCut]


def cuts_of(model: nn.Module, group: Group) -> Cuts:
    """Work out all cuts over ``group``; nothing is changed yet.

    Raises:
        ValueError: a module can't be cut; the message names it.
    """
    roles = roles_of(model)
    cuts = Cuts({}, [])
    for attention in roles.attentions:
        _cut_attention(model, attention, group, cuts)
    for name, role in roles.layers.items():
        if role != "replicated":
            cuts.modules[name] = _cut_layer(model.get_submodule(name), name, role, group)
    _cut_vocabulary(model, group, cuts, roles)
    for name, cut in cuts.modules.items():
        _check_module(model.get_submodule(name), name, cut)
    return cuts


def in_features(module: nn.Module) -> int:
    """K of a linear layer or a ``Conv1D``."""
    return module.nx if hasattr(module, "nx") else module.in_features


def out_features(module: nn.Module) -> int:
    """M of a linear layer or a ``Conv1D``."""
    return module.nf if hasattr(module, "nf") else module.out_features


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' transposed linear layer."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nx")


def _cut_attention(model: nn.Module, attention: Attention, group: Group, cuts: Cuts) -> None:
    core = attention.core
    widths = {name: out_features(model.get_submodule(name)) for name in attention.projections}
    width = in_features(model.get_submodule(attention.out))
    num_heads = _divide(attention.out, width, attention.head_dim, "head_dim")
    num_kv_heads = _num_kv_heads(attention, widths, num_heads)
    try:
        layout = HeadLayout.of(num_heads, num_kv_heads, group.shares)
    except ValueError as error:
        raise ValueError(f"{core}: {error}") from None
    cuts.attentions.append(AttentionCut(attention, layout))
    for name, role in attention.projections.items():
        cuts.modules[name] = _cut_projection(name, role, widths[name], layout, group)
    sharding = layout.query_sharding(attention.head_dim, dim=1)
    cuts.modules[attention.out] = Cut(_ROW, sharding)


def _num_kv_heads(attention: Attention, widths: dict[str, int], num_heads: int) -> int:
    for name, role in attention.projections.items():
        heads = _divide(name, widths[name], attention.head_dim, "head_dim")
        if role == "key":
            return heads
        if role == "stacked qkv":
            return _divide(name, heads - num_heads, 2, "keys and values")
        if role == "stacked kv":
            return _divide(name, heads, 2, "keys and values")
        if role == "interleaved qkv":
            if heads != 3 * num_heads:
                raise ValueError(f"{name}: expected {3 * num_heads} heads' rows, got {heads}")
            return num_heads
    raise ValueError(f"{attention.core}: no projection of its plan makes keys")


def _cut_projection(name: str, role: str, width: int, layout: HeadLayout, group: Group) -> Cut:
    heads, kv_heads = layout.num_heads, layout.num_kv_heads
    if role == "query":
        return Cut(_COLUMN, layout.query_sharding(_divide(name, width, heads, "heads")))
    if role == "interleaved qkv":
        return Cut(_COLUMN, layout.query_sharding(_divide(name, width, heads, "heads")))
    if role in ("key", "value"):
        kv = layout.kv_sharding(_divide(name, width, kv_heads, "KV heads"))
        return Cut(_COLUMN, kv, replicas=(0, kv) if layout.replicated else None)
    if role == "stacked kv":
        kv = layout.kv_sharding(_divide(name, width, 2 * kv_heads, "keys and values"))
        both = fuse(kv, kv)
        return Cut(_COLUMN, both, replicas=(0, both) if layout.replicated else None)
    head_dim = _divide(name, width, heads + 2 * kv_heads, "queries, keys and values")
    start, stop = layout.query[group.rank]
    kv = layout.kv_sharding(head_dim)
    replicas = ((stop - start) * head_dim, fuse(kv, kv)) if layout.replicated else None
    return Cut(_COLUMN, layout.qkv_sharding(head_dim), replicas=replicas)


def _cut_layer(module: nn.Module, name: str, role: str, group: Group) -> Cut:
    if role == "shared on heads":
        return Cut("shared")
    if role == "embedding":
        return Cut("embedding", _vocabulary(module, name, group))
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        raise ValueError(f"{name}: expected a linear layer, got {type(module).__name__}")
    if role in ("row", "row split"):
        sharding = features(in_features(module), group.shares, dim=1)
        return Cut(_ROW, sharding, whole=role == "row split")
    width = out_features(module)
    if role == "gate up":
        half = features(_divide(name, width, 2, "gate and up"), group.shares)
        return Cut(_COLUMN, fuse(half, half))
    return Cut(_COLUMN, features(width, group.shares), whole=role == "column gather")


def _cut_vocabulary(model: nn.Module, group: Group, cuts: Cuts, roles: Roles) -> None:
    """The input embedding and the LM head, which plans may leave out."""
    names = {module: name for name, module in model.named_modules()}
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if isinstance(embedding, nn.Embedding) and roles.layers.get(names[embedding]) != "replicated":
        name = names[embedding]
        cuts.modules[name] = Cut("embedding", _vocabulary(embedding, name, group))
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        cuts.modules[names[head]] = Cut("lm head", vocab_sharding(head.out_features, group.shares))


def _vocabulary(module: nn.Module, name: str, group: Group) -> Sharding:
    if not isinstance(module, nn.Embedding):
        raise ValueError(f"{name}: expected an embedding, got {type(module).__name__}")
    if module.max_norm is not None:
        raise ValueError(
            f"{name}: max_norm: expected None, got {module.max_norm}; renormalise the table first"
        )
    return vocab_sharding(module.num_embeddings, group.shares)


def _check_module(module: nn.Module, name: str, cut: Cut) -> None:
    """A module is replaced only where its twin does exactly what it does."""
    kind = type(module).__name__
    if cut.kind == "shared":
        return
    if parametrize.is_parametrized(module):
        check_replaceable(module, name)
    if cut.kind == "embedding":
        good = type(module) is nn.Embedding or kind.endswith("ScaledWordEmbedding")
    else:
        good = type(module) is nn.Linear
        good |= is_conv1d(module) and cut.kind in (_COLUMN, _ROW) and not cut.whole
    if not good:
        raise ValueError(
            f"{name}: a module of type {kind} can't be cut; expected a plain torch one "
            f"(parallelize before adding adapters, and without quantization)"
        )
    check_replaceable(module, name)


def _divide(name: str, whole: int, parts: int, what: str) -> int:
    if parts < 1 or whole % parts:
        raise ValueError(f"{name}: {whole} features do not divide by {what} = {parts}")
    return whole // parts
