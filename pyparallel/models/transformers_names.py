"""What transformers calls the tensors of its models in a checkpoint, and where they are there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pyparallel.checkpoint.source import Checkpoint, CheckpointError

# Tensors of older checkpoints, and of GGUFs, that hold nothing a model has to load.
NOT_LOADED = re.compile(
    r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias|position_ids"
    r"|^rope_freqs\.weight)$"
)


def stored_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's name of each of the model's tensors, where it has one.

    Raises:
        CheckpointError: the checkpoint has a tensor that is none of the model's, or has it in a layout
            that transformers converts while loading.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [rule for rule in transforms if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in transforms if isinstance(rule, WeightConverter)]
    wanted: dict[str, Any] = model.state_dict()
    ignored = [re.compile(rule) for rule in model._keys_to_ignore_on_load_unexpected or ()]
    found: dict[str, str] = {}
    for source in checkpoint.shapes:
        name, converter = rename_source_key(
            source, renamings, converters, model.base_model_prefix, wanted
        )
        if name in wanted and converter is None:
            found[name] = source
        elif converter is not None:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {source} is stored in another layout than the model's "
                f"{name}; load it with transformers and call parallelize()"
            )
        elif not NOT_LOADED.search(source) and not any(rule.search(name) for rule in ignored):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {source} is not one of a {type(model).__name__}"
            )
    return found


def saved_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What transformers would call these tensors of a model in a checkpoint.

    Raises:
        ValueError: it would store them in another layout.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    held = list(names)
    # Its own saving runs on numbers that stand for the tensors.
    numbers = {tied.get(name, name): torch.tensor(number) for number, name in enumerate(held)}
    reverted = {
        int(number): name
        for name, number in revert_weight_conversion(model, numbers).items()
        if number.dim() == 0
    }
    if sorted(reverted) != list(range(len(held))):
        raise ValueError(
            f"{type(model).__name__}: transformers stores its tensors in another layout than the "
            f"model's; save and export know no way there"
        )
    return {name: reverted[number] for number, name in enumerate(held)}
