"""What GGUF metadata say a model is: as the decoder's configuration, and as a config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pyparallel.models.config import DecoderConfig, UnknownArchitectureError, from_hugging_face


def from_gguf(metadata: Mapping[str, Any]) -> DecoderConfig:
    """Read a GGUF file's metadata.

    Raises:
        UnknownArchitectureError: the architecture is not one that is read from GGUF.
        ValueError: a key is missing, or says what the decoder does not have.
    """
    config = from_hugging_face(_gguf_config(metadata))
    factors = metadata.get("rope_factors")
    if factors is not None and len(factors) != config.rotary_dim // 2:
        raise ValueError(
            f"GGUF: expected {config.rotary_dim // 2} factors in rope_freqs.weight, got {len(factors)}"
        )
    return replace(config, rope_factors=factors)


def hugging_face_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model that a GGUF file's metadata describe, in fp32.

    Raises:
        UnknownArchitectureError: as :func:`from_gguf`.
        ValueError: its rotary frequencies are listed one by one, which has no exact counterpart.
    """
    if metadata.get("rope_factors") is not None:
        raise ValueError(
            "GGUF: its rotary frequencies are listed, and no config.json says the same; give source=, "
            "a folder with the original config.json"
        )
    config = {key: value for key, value in _gguf_config(metadata).items() if value is not None}
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config["model_type"]]
    return {"architectures": [f"{kind}ForCausalLM"], "dtype": "float32", **config}


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF metadata in the words of a config.json."""
    architecture = metadata.get("general.architecture")
    if architecture not in ("llama", "qwen2", "qwen3"):
        raise UnknownArchitectureError(
            f"GGUF architecture: expected llama, qwen2 or qwen3, got {architecture!r}; "
            f"other models are read from safetensors"
        )

    def get(key: str, *default: Any) -> Any:
        value = metadata.get(f"{architecture}.{key}", *default)
        if value is None and not default:
            raise ValueError(f"GGUF metadata: {architecture}.{key} is missing")
        return value

    heads = get("attention.head_count")
    hidden = get("embedding_length")
    head_dim = get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise ValueError(
                f"GGUF metadata: {architecture}.{key}: expected the size of a head, {head_dim}, as "
                f"transformers and llama.cpp do for {architecture}, got {get(key)}"
            )
    if metadata.get(f"{architecture}.attention.causal", True) is not True:
        raise ValueError(
            f"GGUF metadata: {architecture}.attention.causal: expected true, got an encoder; only "
            f"decoders are read from GGUF"
        )
    return {
        "model_type": architecture,
        "vocab_size": metadata.get("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata, architecture),
        "tie_word_embeddings": metadata.get("tied", False),
        "attention_bias": metadata.get("attention_bias", False),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _one_or_list(metadata.get("stop_ids", ())),
    }


def _rope_scaling(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any] | None:
    """As llama.cpp reads it: without a type a factor is linear, and 0 means none; ``scale_linear`` is
    the factor's old name.
    """
    prefix = f"{architecture}.rope."
    kind = metadata.get(prefix + "scaling.type", "linear")
    factor = metadata.get(prefix + "scaling.factor", metadata.get(prefix + "scale_linear", 0)) or 1
    if kind not in ("none", "linear"):
        raise ValueError(
            f"GGUF metadata: {prefix}scaling.type: expected 'none' or 'linear', got {kind!r}; load the "
            f"model's safetensors, whose config.json says all of it"
        )
    if kind == "none" or factor == 1:
        return None
    return {"rope_type": "linear", "factor": float(factor)}


def _one_or_list(ids: Sequence[int]) -> int | list[int] | None:
    """As a config.json has it."""
    return ids[0] if len(ids) == 1 else list(ids) or None
