"""Attention modules of transformers, told how many heads are theirs."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyparallel.models.swap.cuts import AttentionCut
from pyparallel.models.swap.plans import GROUPS, KV_HEADS, QUERY_FEATURES, QUERY_HEADS


class LocalConfig:
    """A model's config with some sizes replaced; everything else is read from it as it is now."""

    def __init__(self, config: Any, **sizes: int) -> None:
        self._config = config
        vars(self).update(sizes)

    def __getattr__(self, name: str) -> Any:
        # While it is copied or unpickled, the object has no config yet.
        if name == "_config" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._config, name)


def local_sizes(core: nn.Module, cut: AttentionCut, rank: int) -> dict[str, int]:
    """The core's attributes that count heads or their features, with this rank's values.

    Raises:
        ValueError: an attribute does not hold the dense count that its projections say.
    """
    layout, head_dim = cut.layout, cut.attention.head_dim
    heads = layout.query[rank][1] - layout.query[rank][0]
    kv_heads = layout.kv[rank][1] - layout.kv[rank][0]
    dense_groups = layout.num_heads // layout.num_kv_heads
    counts = {
        **dict.fromkeys(QUERY_HEADS, (layout.num_heads, heads)),
        **dict.fromkeys(KV_HEADS, (layout.num_kv_heads, kv_heads)),
        **dict.fromkeys(GROUPS, (dense_groups, heads // kv_heads)),
        **dict.fromkeys(QUERY_FEATURES, (layout.num_heads * head_dim, heads * head_dim)),
    }
    sizes = {}
    for name, (dense, local) in counts.items():
        if hasattr(core, name):
            if getattr(core, name) != dense:
                raise ValueError(
                    f"{cut.attention.core}.{name}: expected {dense}, as its projections' sizes say, "
                    f"got {getattr(core, name)}"
                )
            sizes[name] = local
    return sizes


def tell_local_heads(core: nn.Module, cut: AttentionCut, rank: int) -> None:
    """Set the core's counts to this rank's."""
    for name, size in local_sizes(core, cut, rank).items():
        setattr(core, name, size)
    if cut.attention.reads_config:
        layout = cut.layout
        core.config = LocalConfig(
            core.config,
            num_attention_heads=layout.query[rank][1] - layout.query[rank][0],
            num_key_value_heads=layout.kv[rank][1] - layout.kv[rank][0],
        )
