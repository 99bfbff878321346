"""What a checkpoint's tensors say that its config does not, or not truly: dtype, tied weights, sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from pyparallel.checkpoint.schema import shown
from pyparallel.checkpoint.source import Checkpoint, CheckpointError
from pyparallel.cut.shard import REPLICATED, Sharding
from pyparallel.models.config import DecoderConfig

# What a model's weights can be in.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# The embedding and the head of each family.
TIED_NAMES = {
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
}
# Elements of two tensors that are compared at a time.
COMPARED = 1 << 22
# Tables of positions are made before a tensor is read; Llama 4's 10 million are the most.
POSITIONS = 1 << 24
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
# What a model may loop over that is no tensor of its own: a default of its class, left as it is.
LOOPED = 1024
_LOOPED = ("_layers", "_heads", "_experts", "_labels", "_groups", "_blocks")
# Keys of a config.json that count what tensors are made of, whatever the model.
_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "hidden_size",
    "n_embd",
    "intermediate_size",
    "n_inner",
    "moe_intermediate_size",
    "vocab_size",
    "head_dim",
)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What a checkpoint's config says its weights are (``dtype``, then ``torch_dtype``), else its index;
    else the first of its tensors that are floats, as transformers takes it. fp32 for a GGUF, whose
    blocks are neither.

    Raises:
        CheckpointError: the config names a dtype that a model can't have.
    """
    config = checkpoint.config()
    name = next((config[key] for key in ("dtype", "torch_dtype") if config.get(key)), None)
    name = name or getattr(checkpoint, "index_dtype", None)
    if name is not None:
        if not isinstance(name, str) or name not in DTYPES:
            raise CheckpointError(
                f"{checkpoint.path}: dtype of its config or index: expected one of "
                f"{', '.join(DTYPES)}, got {shown(name)}"
            )
        return DTYPES[name]
    found = (checkpoint.dtype(name) for name in checkpoint.shapes)
    return next((dtype for dtype in found if dtype in DTYPES.values()), torch.float32)


def check_sizes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """No count or size of a config is larger than the tensors can hold, so that whatever loops over
    layers or heads, or makes room for them, ends.

    Args:
        config: of any model; what it has of the usual keys is checked.

    Raises:
        CheckpointError: the first that is.
    """
    shapes = checkpoint.shapes.values()
    # A fused tensor of several parts is longer than each; experts and layers are tensors, or an axis.
    most = max([len(checkpoint.shapes), *(size for shape in shapes for size in shape)], default=0)
    for name, value in config.items():
        if isinstance(value, Mapping):
            # A text_config and its like.
            check_sizes(checkpoint, value)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        limit = most if name in _COUNTS else math.inf
        if name.endswith(_LOOPED):
            limit = min(limit, max(most, LOOPED))
        if name in _POSITIONS:
            limit = max(most, POSITIONS)
        if value > limit or (value < 0 and name in _COUNTS):
            raise CheckpointError(
                f"{checkpoint.path}: {name} of its config: expected at most {limit}, by the shapes and "
                f"the number of its tensors; got {value}"
            )


def untie_if_stored(config: DecoderConfig, checkpoint: Checkpoint) -> DecoderConfig:
    """A tied model whose embedding and head are both stored, and differ, is not tied: transformers keeps
    both (and says so), whatever the config's flag.
    """
    if not config.tied:
        return config
    names = [stored_name(checkpoint, name) for name in TIED_NAMES[config.family]]
    if None in names or equal_tensors(checkpoint, *names):
        return config
    return replace(config, tied=False)


def stored_name(checkpoint: Checkpoint, name: str) -> str | None:
    """What a checkpoint calls a tensor, of which a bare base model's lacks the first part."""
    bare = name.partition(".")[2]
    return next((held for held in (name, bare) if held in checkpoint.shapes), None)


def equal_tensors(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two stored tensors are the same numbers; read once, some rows at a time."""
    known = checkpoint.__dict__.setdefault("_compared", {})
    if (one, other) not in known:
        known[one, other] = _equal(checkpoint, one, other)
    return known[one, other]


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    shape = checkpoint.shapes[one]
    if checkpoint.shapes[other] != shape:
        return False
    if len(shape) != 2:
        return torch.equal(*(checkpoint.read(name, REPLICATED, 0) for name in (one, other)))
    step = max(1, COMPARED // max(1, shape[1]))
    for start in range(0, shape[0], step):
        rows = Sharding(0, shape[0], (((start, min(start + step, shape[0])),),))
        dtype = torch.promote_types(checkpoint.dtype(one), checkpoint.dtype(other))
        parts = [checkpoint.read(name, rows, 0, dtype=dtype) for name in (one, other)]
        if not torch.equal(*parts):
            return False
    return True
