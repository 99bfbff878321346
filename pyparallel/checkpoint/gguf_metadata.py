"""What GGUF metadata may be, and which tensor of Hugging Face's each of GGUF's is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from pyparallel.checkpoint.format import CheckpointError
from pyparallel.checkpoint.schema import EPS, SIZE, TEXT, THETA, Key, check_keys

# GGUF's "none" is the largest uint32.
_TOKEN = Key("int", -1, 2**32 - 1)
STOPS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
STOP_LIST = "tokenizer.ggml.eos_token_ids"

GENERAL = {
    "general.architecture": TEXT,
    "tokenizer.ggml.bos_token_id": _TOKEN,
    **dict.fromkeys(STOPS, _TOKEN),
    STOP_LIST: Key("ints", -1, 2**32 - 1),
}
# Under the architecture's name.
ARCHITECTURE = {
    "block_count": SIZE,
    "context_length": SIZE,
    "embedding_length": SIZE,
    "feed_forward_length": SIZE,
    "attention.head_count": SIZE,
    "attention.head_count_kv": SIZE,
    "attention.key_length": SIZE,
    "attention.value_length": SIZE,
    "attention.layer_norm_rms_epsilon": EPS,
    "rope.dimension_count": SIZE,
    "rope.freq_base": THETA,
    "rope.scaling.type": TEXT,
    "rope.scaling.factor": Key("number", 0, 1e6),
    "rope.scale_linear": Key("number", 0, 1e6),
}


def scalars(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that are kept; of a list of one number for each layer the number."""
    found = {}
    for name, value in metadata.items():
        same = isinstance(value, list) and name != STOP_LIST and len(set(value)) == 1
        if value is not None:
            found[name] = value[0] if same else value
    return found


def check_metadata(metadata: Mapping[str, Any], num_tensors: int) -> None:
    """Hold the metadata against their tables.

    Raises:
        ValueError: a key is of another type or out of range; the message names it.
    """
    check_keys("GGUF metadata", metadata, GENERAL)
    architecture = metadata.get("general.architecture")
    table = {f"{architecture}.{name}": key for name, key in ARCHITECTURE.items()}
    # Each layer has a tensor at least: what loops over layers ends.
    table[f"{architecture}.block_count"] = Key("int", 1, num_tensors)
    check_keys("GGUF metadata", metadata, table)


def stop_ids(metadata: Mapping[str, Any], end_tokens: Sequence[int]) -> list[int]:
    """The tokens that end a text: of a text, of a turn (eot) and of a message (eom), as llama.cpp does;
    the first is the text's own.
    """
    found = [metadata.get(key) for key in STOPS]
    found = [*found[:1], *metadata.get(STOP_LIST, ()), *found[1:], *end_tokens]
    return list(dict.fromkeys(i for i in found if i is not None and 0 <= i < 2**31))


def hugging_face_names(
    architecture: str | None, metadata: Mapping[str, Any], path: Path
) -> dict[str, str]:
    """GGUF's tensor names to Hugging Face's, for the parts that Llama-like decoders have.

    Raises:
        CheckpointError: the architecture is unknown.
    """
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = metadata.get(f"{architecture}.block_count")
    if architecture not in kinds or layers is None:
        raise CheckpointError(f"{path}: unknown GGUF architecture {architecture!r}")
    table = gguf.get_tensor_name_map(kinds[architecture], layers)
    parts = ["model.embed_tokens", "model.norm", "lm_head"]
    inside = ["input_layernorm", "post_attention_layernorm"]
    inside += [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    inside += [f"self_attn.{part}" for part in ("q_norm", "k_norm")]
    inside += [f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    parts += [f"model.layers.{layer}.{part}" for layer in range(layers) for part in inside]
    names = {}
    for part in parts:
        for suffix in (".weight", ".bias"):
            found = table.get_name(part + suffix, try_suffixes=(".weight", ".bias"))
            if found is not None:
                names[found] = part + suffix
    return names
