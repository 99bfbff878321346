"""The keys of a config.json that the decoder reads: type, range, and an absent one's value.

An absent key means what transformers' own config class makes of it. They are transformers 5.24's,
written down here because the decoder needs no transformers; tests/models/test_config_keys.py holds them
against the installed classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pyparallel.checkpoint.schema import (
    BOOL,
    CONFIG,
    EPS,
    ID,
    IDS,
    SIZE,
    TEXT,
    THETA,
    Key,
    check_keys,
    shown,
)


class Setting(NamedTuple):
    """A key, and its value where it is absent."""

    key: Key
    default: Any


_SHARE = Key("number", 0, 1)
_SIZE_OR_NULL = Key("int", 1, null=True)
_OBJECT = Key("object", null=True)
_FACTOR = Key("number", 1e-6, 1e6)

# Of rope_parameters and rope_scaling.
ROPE = {
    "rope_type": Key("str", null=True),
    "type": Key("str", null=True),
    "rope_theta": THETA,
    "factor": Key("number", 1e-6, 1e6, null=True),
    "low_freq_factor": _FACTOR,
    "high_freq_factor": _FACTOR,
    "original_max_position_embeddings": _SIZE_OR_NULL,
    "partial_rotary_factor": Key("number", 0, 1, null=True),
    "attention_factor": Key("number", 0, 1e6, null=True),
    "beta_fast": Key("number", 0, 1e6, null=True),
    "beta_slow": Key("number", 0, 1e6, null=True),
    "mscale": Key("number", 0, 1e6, null=True),
    "mscale_all_dim": Key("number", 0, 1e6, null=True),
    "truncate": Key("bool", null=True),
    "short_factor": Key("numbers", 1e-6, 1e6, null=True),
    "long_factor": Key("numbers", 1e-6, 1e6, null=True),
}
# What a kind of scaling can't do without.
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}

_ROPE_KEYS = {
    "rope_parameters": Setting(_OBJECT, None),
    "rope_scaling": Setting(_OBJECT, None),
    "original_max_position_embeddings": Setting(_SIZE_OR_NULL, None),
}
_LLAMA = {
    **_ROPE_KEYS,
    "rope_theta": Setting(THETA, 10000.0),
    "partial_rotary_factor": Setting(Key("number", 0, 1, null=True), None),
    "vocab_size": Setting(SIZE, 32000),
    "hidden_size": Setting(SIZE, 4096),
    "intermediate_size": Setting(SIZE, 11008),
    "num_hidden_layers": Setting(SIZE, 32),
    "num_attention_heads": Setting(SIZE, 32),
    "num_key_value_heads": Setting(_SIZE_OR_NULL, None),
    "head_dim": Setting(_SIZE_OR_NULL, None),
    "hidden_act": Setting(TEXT, "silu"),
    "max_position_embeddings": Setting(SIZE, 2048),
    "rms_norm_eps": Setting(EPS, 1e-6),
    "pad_token_id": Setting(ID, None),
    "bos_token_id": Setting(IDS, 1),
    "eos_token_id": Setting(IDS, 2),
    "tie_word_embeddings": Setting(BOOL, False),
    "attention_dropout": Setting(Key("number", 0, 1, null=True), 0.0),
    "attention_bias": Setting(BOOL, False),
    "mlp_bias": Setting(BOOL, False),
}
_SLIDING = {
    "use_sliding_window": Setting(BOOL, False),
    "sliding_window": Setting(_SIZE_OR_NULL, 4096),
    "max_window_layers": Setting(Key("int"), 28),
    "layer_types": Setting(Key("strs", null=True), None),
}
_QWEN = {
    **_LLAMA,
    **_SLIDING,
    "vocab_size": Setting(SIZE, 151936),
    "intermediate_size": Setting(SIZE, 22016),
    "num_key_value_heads": Setting(_SIZE_OR_NULL, 32),
    "max_position_embeddings": Setting(SIZE, 32768),
    "bos_token_id": Setting(IDS, None),
    "eos_token_id": Setting(IDS, None),
    "attention_dropout": Setting(_SHARE, 0.0),
}

SETTINGS: dict[str, dict[str, Setting]] = {
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA,
        "intermediate_size": Setting(SIZE, 14336),
        "num_key_value_heads": Setting(SIZE, 8),
        "max_position_embeddings": Setting(SIZE, 131072),
        "sliding_window": Setting(_SIZE_OR_NULL, 4096),
        # With them transformers' AutoConfig makes a Ministral of it.
        "layer_types": Setting(Key("strs", null=True), None),
        "attention_dropout": Setting(_SHARE, 0.0),
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": Setting(SIZE, 128)},
    "gpt2": {
        "vocab_size": Setting(SIZE, 50257),
        "n_positions": Setting(SIZE, 1024),
        "n_embd": Setting(SIZE, 768),
        "n_layer": Setting(SIZE, 12),
        "n_head": Setting(SIZE, 12),
        "n_inner": Setting(_SIZE_OR_NULL, None),
        "activation_function": Setting(TEXT, "gelu_new"),
        "resid_pdrop": Setting(_SHARE, 0.1),
        "embd_pdrop": Setting(_SHARE, 0.1),
        "attn_pdrop": Setting(_SHARE, 0.1),
        "layer_norm_epsilon": Setting(EPS, 1e-5),
        "scale_attn_weights": Setting(BOOL, True),
        "scale_attn_by_inverse_layer_idx": Setting(BOOL, False),
        "reorder_and_upcast_attn": Setting(BOOL, False),
        "add_cross_attention": Setting(BOOL, False),
        "pad_token_id": Setting(ID, None),
        "bos_token_id": Setting(IDS, 50256),
        "eos_token_id": Setting(IDS, 50256),
        "tie_word_embeddings": Setting(BOOL, True),
    },
    "gpt_neox": {
        **_ROPE_KEYS,
        "rotary_pct": Setting(Key("number", 1e-6, 1), 0.25),
        "rotary_emb_base": Setting(THETA, 10000.0),
        "vocab_size": Setting(SIZE, 50432),
        "hidden_size": Setting(SIZE, 6144),
        "intermediate_size": Setting(SIZE, 24576),
        "num_hidden_layers": Setting(SIZE, 44),
        "num_attention_heads": Setting(SIZE, 64),
        "hidden_act": Setting(TEXT, "gelu"),
        "max_position_embeddings": Setting(SIZE, 2048),
        "layer_norm_eps": Setting(EPS, 1e-5),
        "attention_dropout": Setting(_SHARE, 0.0),
        "hidden_dropout": Setting(_SHARE, 0.0),
        "pad_token_id": Setting(ID, None),
        "bos_token_id": Setting(IDS, 0),
        "eos_token_id": Setting(IDS, 2),
        "tie_word_embeddings": Setting(BOOL, False),
        "use_parallel_residual": Setting(BOOL, True),
        "attention_bias": Setting(BOOL, True),
    },
}
# Other names of a type's keys; where both are there, transformers takes these.
_ALIASES = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
}
# Keys that transformers' class does not have: its model is as if they were absent.
_NOT_READ = {"mistral": ("attention_bias", "mlp_bias"), "qwen2": ("attention_bias", "mlp_bias")}
_NOT_READ["qwen3"] = ("mlp_bias",)


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of one of :data:`SETTINGS`, checked, with every key that is absent filled in.

    The rotary settings, in whichever of their spellings, become ``rope_parameters``.

    Raises:
        ValueError: a key is of another type or out of range; the message names it.
    """
    model_type = config["model_type"]
    settings = SETTINGS[model_type]
    where = f"config of a {model_type}"
    found = dict(config)
    for alias, name in _ALIASES.get(model_type, {}).items():
        if alias in found:
            found[name] = found.pop(alias)
    for name in _NOT_READ.get(model_type, ()):
        found.pop(name, None)
    check_keys(where, found, {**CONFIG, **{name: each.key for name, each in settings.items()}})
    found = {**{name: each.default for name, each in settings.items()}, **found}
    if found.get("head_dim") is None:
        size, heads = ("n_embd", "n_head") if model_type == "gpt2" else _SIZES
        if found[size] % found[heads]:
            raise ValueError(
                f"{where}: {size}: expected a multiple of {heads}, {found[heads]}, got {found[size]}"
            )
    if "rope_parameters" in settings:
        found["rope_parameters"] = _rope(where, found)
        for name in ("rope_scaling", "rope_theta", "rotary_pct", "rotary_emb_base"):
            found.pop(name, None)
    _check_windows(where, found)
    return found


_SIZES = ("hidden_size", "num_attention_heads")


def _rope(where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_scaling`` before ``rope_parameters``, and what neither has from the keys beside them."""
    rope = dict(config["rope_scaling"] or config["rope_parameters"] or {})
    check_keys(f"{where}: rope_parameters", rope, ROPE)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if config["model_type"] == "gpt_neox":
        rope.setdefault("rope_theta", config["rotary_emb_base"])
        rope.setdefault("partial_rotary_factor", config["rotary_pct"])
    else:
        rope.setdefault("rope_theta", config["rope_theta"])
        if config["partial_rotary_factor"] is not None:
            rope.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
        # Llama's own frequencies, which "default" means, are those of the whole head.
        if kind != "default" and rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(
                f"{where}: partial_rotary_factor: expected 1 with rope_type {shown(kind)}, as "
                f"transformers' model does, got {rope['partial_rotary_factor']}"
            )
        rope.pop("partial_rotary_factor", None)
    for name in _NEEDED.get(kind, ()):
        if rope.get(name) is None:
            raise ValueError(f"{where}: rope_parameters: rope_type {shown(kind)} needs {name}")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ValueError(
            f"{where}: rope_parameters: expected low_freq_factor below high_freq_factor, got "
            f"{rope['low_freq_factor']} and {rope['high_freq_factor']}"
        )
    outside = config["original_max_position_embeddings"]
    if outside is not None and kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = outside
    return {**rope, "rope_type": kind}


def _check_windows(where: str, config: Mapping[str, Any]) -> None:
    """The kinds of attention that are listed: one a layer, and a window where one slides."""
    kinds = config.get("layer_types")
    if kinds is None or "layer_types" not in SETTINGS[config["model_type"]]:
        return
    layers = config["num_hidden_layers"]
    if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{where}: layer_types: expected full_attention or sliding_attention for each of {layers} "
            f"layers, got {shown(kinds)}"
        )
    window, uses = config["sliding_window"], config.get("use_sliding_window", True)
    if "sliding_attention" in kinds and not (uses and window is not None):
        raise ValueError(
            f"{where}: layer_types: expected full_attention alone, since use_sliding_window is "
            f"{str(uses).lower()} and sliding_window {shown(window)}; got {shown(kinds)}"
        )
