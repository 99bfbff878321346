"""The fields of a :class:`ModelShape` that a Hugging Face config.json gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyparallel.checkpoint.schema import Key, check_keys, shown
from pyparallel.layers.parallel_mlp import GATED
from pyparallel.limits import check_count
from pyparallel.models.config import DecoderConfig, UnknownArchitectureError, from_hugging_face
from pyparallel.planner.kept import kept_modules

# More than any decoder has; layers are listed and spread over stages one by one.
MAX_LAYERS = 512
_SIZE = Key("int", 1)
_COUNT = Key("int", 0)
_OPTIONAL = Key("int", 1, null=True)
_KEYS = {
    "hidden_size": _SIZE,
    "num_hidden_layers": _SIZE,
    "num_attention_heads": _SIZE,
    "intermediate_size": _SIZE,
    "vocab_size": _SIZE,
    "num_key_value_heads": _OPTIONAL,
    "head_dim": _OPTIONAL,
    "max_position_embeddings": _OPTIONAL,
    "sliding_window": _OPTIONAL,
    "tie_word_embeddings": Key("bool", null=True),
    "attention_bias": Key("bool", null=True),
    "num_local_experts": _SIZE,
    "num_experts": _SIZE,
    "num_experts_per_tok": _SIZE,
    "moe_intermediate_size": _SIZE,
    "shared_expert_intermediate_size": _COUNT,
}
# Families with Llama's names of sizes that the decoder of pyparallel does not build: how their layers
# differ from Llama's. `parallelize` cuts them as transformers' own modules.
_FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {"tied": True, "norms": 1},
    "gemma": {"tied": True},
    "gemma2": {"tied": True, "norms": 4},
    "gemma3_text": {"tied": True, "norms": 4, "qk_norm": True},
    "gpt_oss": {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "sinks": True},
    "granite": {},
    "ministral": {},
    "mixtral": {},
    "phi3": {},
    "qwen2_moe": {"qkv_bias": True},
    "qwen3_moe": {"qk_norm": True},
    "smollm3": {"tied": True},
}


def config_fields(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Keyword arguments of :class:`pyparallel.planner.shape.ModelShape`.

    Raises:
        ValueError: another model type, or a key of another type or range; the message names it.
    """
    for key in ("num_hidden_layers", "n_layer"):
        if key in config:
            check_count(f"{name}: {key}", config[key], MAX_LAYERS)
    kept = {"kept": kept_modules(config)}
    try:
        return _own(from_hugging_face(config), name) | kept
    except UnknownArchitectureError as error:
        kind = config.get("model_type")
        if kind not in _FAMILIES:
            more = f"{str(error).partition(', got')[0]}, {', '.join(_FAMILIES)}"
            raise ValueError(f"{more}; got {shown(kind)}") from None
    return _llama_like(config, name) | kept


def _own(config: DecoderConfig, name: str) -> dict[str, Any]:
    windows = [window for window in config.windows if window]
    return {
        "name": name,
        "hidden": config.hidden_size,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "ffn": config.intermediate_size,
        "vocab": config.vocab_size,
        "max_positions": config.max_positions,
        "tied": config.tied,
        "gated": config.activation in GATED,
        "norm": config.norm,
        "qk_norm": config.qk_norm,
        "qkv_bias": config.qkv_bias,
        "out_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "learned_positions": 0 if config.rotary_dim else config.max_positions,
        "window": max(windows, default=0),
        "windowed_layers": len(windows),
    }


def _llama_like(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind = config["model_type"]
    where = f"config of a {kind}"
    check_keys(where, config, _KEYS)
    needed = list(_KEYS)[:5]
    for key in needed:
        if key not in config:
            raise ValueError(f"{where}: {key}: expected a number, but it is not there")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    fields = {
        "name": name,
        "hidden": hidden,
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "ffn": config["intermediate_size"],
        "vocab": config["vocab_size"],
        "max_positions": config.get("max_position_embeddings") or 2048,
        "tied": bool(config.get("tie_word_embeddings")),
        "qkv_bias": bool(config.get("attention_bias")),
        "out_bias": bool(config.get("attention_bias")),
        **_FAMILIES[kind],
    }
    if config.get("tie_word_embeddings") is not None:
        fields["tied"] = config["tie_word_embeddings"]
    if experts:
        if "num_experts_per_tok" not in config:
            raise ValueError(
                f"{where}: num_experts_per_tok: expected a number with {experts} experts"
            )
        fields |= {
            "experts": experts,
            "top_k": config["num_experts_per_tok"],
            "expert_ffn": config.get("moe_intermediate_size") or config["intermediate_size"],
            "shared_ffn": config.get("shared_expert_intermediate_size", 0),
        }
    return fields
