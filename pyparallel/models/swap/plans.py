"""How the modules of each family of transformers models are cut: data, and its reading.

A plan names modules by patterns in which ``*`` stands for a layer's number, and gives each a role:

    role                what is cut
    ==================  =====================================================================
    column, row         output features; input features
    column gather       output features, and the whole output is gathered on every rank
    row split           input features, of a whole input that is cut there
    gate up             output features of two projections stored one after the other
    query, key, value   output features, by heads
    stacked qkv         by heads: all queries, then all keys, then all values
    stacked kv          by heads: all keys, then all values
    interleaved qkv     by heads: each head's query, key and value together
    embedding           rows of the vocabulary
    shared on heads     nothing, but the gradient is summed, since every rank sees its heads only
    replicated          nothing
    ==================  =====================================================================

Families without a plan of ours follow the ``base_model_tp_plan`` that their config ships.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AttentionPlan:
    """One kind of attention module.

    Attributes:
        core: the module whose forward attends over heads.
        projections: under ``core``: what makes queries, keys and values, with their roles.
        out: the output projection, beside ``core``.
        head_dim: the core's attribute that holds the size of a head.
        reads_config: its forward takes head counts from ``core.config``.
    """

    core: str
    projections: Mapping[str, str]
    out: str
    head_dim: str = "head_dim"
    reads_config: bool = False


@dataclass(frozen=True)
class Plan:
    """All kinds of attention of a family, and the roles of its other modules."""

    attentions: tuple[AttentionPlan, ...]
    layers: Mapping[str, str] = field(default_factory=dict)


_STACKED_GATE_UP = {"mlp.gate_up_proj": "gate up", "mlp.down_proj": "row"}
_SEPARATE_QKV = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
_BERT_QKV = {"query": "query", "key": "key", "value": "value"}
_GLM = Plan(
    (AttentionPlan("layers.*.self_attn", _SEPARATE_QKV, "self_attn.o_proj"),), _STACKED_GATE_UP
)

PLANS: dict[str, Plan] = {
    "gpt2": Plan(
        (
            AttentionPlan("h.*.attn", {"c_attn": "stacked qkv"}, "attn.c_proj"),
            AttentionPlan(
                "h.*.crossattention",
                {"q_attn": "query", "c_attn": "stacked kv"},
                "crossattention.c_proj",
            ),
        ),
        {"mlp.c_fc": "column", "mlp.c_proj": "row"},
    ),
    "gpt_neox": Plan(
        (
            AttentionPlan(
                "layers.*.attention",
                {"query_key_value": "interleaved qkv"},
                "attention.dense",
                "head_size",
            ),
        ),
        {"mlp.dense_h_to_4h": "column", "mlp.dense_4h_to_h": "row"},
    ),
    "bert": Plan(
        (
            AttentionPlan(
                "layer.*.attention.self", _BERT_QKV, "output.dense", "attention_head_size"
            ),
            AttentionPlan(
                "layer.*.crossattention.self", _BERT_QKV, "output.dense", "attention_head_size"
            ),
        ),
        {
            "layer.*.intermediate.dense": "column",
            "layer.*.output.dense": "row",
            "pooler.dense": "column gather",
            "predictions.transform.dense": "column gather",
        },
    ),
    # Their own plans gather both fused projections whole; cut by heads and by halves none is needed.
    "phi3": Plan(
        (
            AttentionPlan(
                "layers.*.self_attn",
                {"qkv_proj": "stacked qkv"},
                "self_attn.o_proj",
                reads_config=True,
            ),
        ),
        _STACKED_GATE_UP,
    ),
    "glm": _GLM,
    "glm4": _GLM,
}

# The styles of a config's base_model_tp_plan that have a role here.
STYLES = {
    "colwise": "column",
    "rowwise": "row",
    "colwise_gather_output": "column gather",
    "colwise_rep": "column gather",
    "rowwise_split_input": "row split",
    "rowwise_rep": "row split",
    "embedding_rowwise": "embedding",
    "replicated_with_grad_allreduce": "shared on heads",
    "replicate": "replicated",
}

# Modules that plans leave out though they work on shards with parameters that all ranks share: norms
# of a head's features, and activations with a learned parameter.
SHARED_ON_SHARDS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "act_fn")

# A core's attributes that count heads, or features of heads.
QUERY_HEADS = ("num_heads", "num_attention_heads")
KV_HEADS = ("num_key_value_heads",)
GROUPS = ("num_key_value_groups",)
QUERY_FEATURES = ("split_size", "all_head_size")


def generic(name: str) -> str:
    """``name`` with each layer number replaced by ``*``.

    >>> generic("model.layers.12.mlp.up_proj")
    'model.layers.*.mlp.up_proj'
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", f".{name}")[1:]


def matches(name: str, pattern: str) -> bool:
    """Whether ``name`` is, or ends in, ``pattern``."""
    return f".{generic(name)}".endswith(f".{pattern}")


def parent_of(name: str) -> str:
    """The module that holds ``name``; "" for the model."""
    return name.rpartition(".")[0]
