"""What a decoder-only transformer is made of, read from a Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyparallel.checkpoint.schema import shown
from pyparallel.layers.parallel_mlp import GATED
from pyparallel.layers.rope_scaling import scaling_of
from pyparallel.layers.rotary_embedding import RopeScaling, Stretch
from pyparallel.models.config_keys import complete

# What configs call the functions of :class:`pyparallel.layers.ParallelMLP`.
FUNCTIONS = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Of a config whose MLP has a gate: the gated unit of the function.
_UNITS = {function: unit for unit, function in GATED.items()}
GATES = {name: _UNITS[function] for name, function in FUNCTIONS.items() if function in _UNITS}


class UnknownArchitectureError(ValueError):
    """The decoder has no such model type."""


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and choices of one decoder; all sizes are dense.

    Attributes:
        family: whose layout of weights it has: "llama" (also Mistral, Qwen2, Qwen3), "gpt2", "gpt_neox".
        activation: a kind of :class:`ParallelMLP`.
        norm: "rms" or "layer".
        qk_norm: RMS-normalise each head's queries and keys.
        rotary_dim: how many features of a head are rotated; 0: positions are learned and added.
        rope_factors: what each rotary frequency is divided by, where the checkpoint lists it.
        parallel_residual: attention and MLP read the same input (GPT-NeoX).
        windows: for each layer, how many tokens a token sees, or None for all.
        tied: the LM head is the embedding.
        stop_ids: the tokens that end a text.
        embedding_dropout, attention_dropout, hidden_dropout: what training drops behind the embedding,
            of attention's weights, and behind attention and MLP.
        padding_id: the row of the embedding that gets no gradient for being looked up.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    activation: str
    norm: str
    norm_eps: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rotary_dim: int
    rope_theta: float
    rope_scaling: Stretch
    parallel_residual: bool
    windows: tuple[int | None, ...]
    tied: bool
    stop_ids: tuple[int, ...]
    rope_factors: tuple[float, ...] | None = None
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    padding_id: int | None = None


def from_hugging_face(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the dictionary of a config.json.

    Raises:
        UnknownArchitectureError: the model type is not one of the decoder's.
        ValueError: a setting that the decoder does not have, or a key of another type or out of range.
    """
    model_type = config.get("model_type")
    readers = {
        "llama": _llama,
        "mistral": _llama,
        "qwen2": _llama,
        "qwen3": _llama,
        "gpt2": _gpt2,
        "gpt_neox": _gpt_neox,
    }
    if not isinstance(model_type, str) or model_type not in readers:
        raise UnknownArchitectureError(
            f"model_type: expected one of {', '.join(readers)}, got {model_type!r}"
        )
    found = readers[model_type](complete(config))
    if found.rope_scaling.kind == "dynamic":
        # Frequencies that grow from the trained length on are for texts that are longer.
        longest = int(found.max_positions * found.rope_scaling.factor)
        found = replace(found, max_positions=max(found.max_positions, longest))
    return found


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _rate(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name)
    rate = default if value is None else value
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise ValueError(f"{name}: expected 0 to 1, got {rate!r}")
    return float(rate)


def _kind(names: Mapping[str, str], key: str, value: str) -> str:
    if value not in names:
        raise ValueError(f"{key}: expected one of {', '.join(names)}, got {shown(value)}")
    return names[value]


def _rope(config: Mapping[str, Any], max_positions: int) -> tuple[float, float, Stretch]:
    """Base, rotated share of the head, and scaling, in any of the spellings in use."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = given.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base")
    share = given.get("partial_rotary_factor") or config.get("rotary_pct")
    scaling = scaling_of(given, config, max_positions)
    return float(theta or 10000.0), float(share or 1.0), scaling


def _llama(config: Mapping[str, Any]) -> DecoderConfig:
    model_type = config["model_type"]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    layers, positions = config["num_hidden_layers"], config["max_position_embeddings"]
    theta, _, scaling = _rope(config, positions)
    bias = bool(config.get("attention_bias", False))
    return DecoderConfig(
        family="llama",
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_positions=positions,
        activation=_kind(GATES, "hidden_act", config.get("hidden_act", "silu")),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        qkv_bias=bias or model_type == "qwen2",
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=model_type == "qwen3",
        rotary_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        parallel_residual=False,
        windows=_windows(config, layers),
        tied=bool(config.get("tie_word_embeddings", False)),
        stop_ids=_ids(config.get("eos_token_id")),
        attention_dropout=_rate(config, "attention_dropout", 0.0),
        padding_id=config.get("pad_token_id"),
    )


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if config["model_type"] == "mistral" and kinds is None:
        return (window,) * layers
    if not window or not config.get("use_sliding_window", config["model_type"] == "mistral"):
        return (None,) * layers
    if kinds is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = config.get("max_window_layers", layers)
    return tuple(window if layer >= first else None for layer in range(layers))


def _gpt2(config: Mapping[str, Any]) -> DecoderConfig:
    for name, wanted in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if config[name] != wanted:
            raise ValueError(f"{name}: expected {wanted}, got {config[name]}")
    hidden, heads, layers = config["n_embd"], config["n_head"], config["n_layer"]
    return DecoderConfig(
        family="gpt2",
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=4 * hidden if config["n_inner"] is None else config["n_inner"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=config["n_positions"],
        activation=_kind(
            FUNCTIONS, "activation_function", config.get("activation_function", "gelu_new")
        ),
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=False,
        rotary_dim=0,
        rope_theta=0.0,
        rope_scaling=RopeScaling(),
        parallel_residual=False,
        windows=(None,) * layers,
        tied=bool(config.get("tie_word_embeddings", True)),
        stop_ids=_ids(config.get("eos_token_id")),
        embedding_dropout=_rate(config, "embd_pdrop", 0.1),
        attention_dropout=_rate(config, "attn_pdrop", 0.1),
        hidden_dropout=_rate(config, "resid_pdrop", 0.1),
    )


def _gpt_neox(config: Mapping[str, Any]) -> DecoderConfig:
    hidden, heads, layers = (
        config["hidden_size"],
        config["num_attention_heads"],
        config["num_hidden_layers"],
    )
    positions = config["max_position_embeddings"]
    theta, share, scaling = _rope(config, positions)
    bias = config["attention_bias"]
    rotary_dim = int(hidden // heads * share)
    if rotary_dim < 1:
        raise ValueError(
            f"config of a gpt_neox: rotary_pct: expected a feature of a head's {hidden // heads} at "
            f"least, got {share}"
        )
    return DecoderConfig(
        family="gpt_neox",
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=positions,
        activation=_kind(FUNCTIONS, "hidden_act", config.get("hidden_act", "gelu")),
        norm="layer",
        norm_eps=config.get("layer_norm_eps", 1e-5),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        qk_norm=False,
        rotary_dim=rotary_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        parallel_residual=bool(config.get("use_parallel_residual", True)),
        windows=(None,) * layers,
        tied=bool(config.get("tie_word_embeddings", False)),
        stop_ids=_ids(config.get("eos_token_id")),
        embedding_dropout=_rate(config, "hidden_dropout", 0.0),
        attention_dropout=_rate(config, "attention_dropout", 0.0),
        hidden_dropout=_rate(config, "hidden_dropout", 0.0),
    )
