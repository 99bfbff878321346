"""What of peft's ``LoraConfig`` a model that is cut can't have."""

from __future__ import annotations

from typing import Any

# The others look at the base weight, or at activations, whole.
INITS = (True, False, "gaussian", "orthogonal")
# They reach into weights, or share them, beside the layers.
BESIDE = (
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "ensure_weight_tying",
)


def check_config(config: Any, *, is_cut: bool) -> None:
    """Raise where a config asks for more than LoRA around layers and ``modules_to_save``.

    Args:
        is_cut: the model is, so that what first looks at whole weights can't any more.

    Raises:
        ValueError: it names the option.
    """
    for name in BESIDE:
        value = getattr(config, name, None)
        if value:
            raise ValueError(
                f"{name}: expected none on a model that is cut, got {value!r}; do without, or train it "
                f"without parallelize"
            )
    if is_cut and config.init_lora_weights not in INITS:
        raise ValueError(
            f"init_lora_weights: expected True, False, 'gaussian' or 'orthogonal' on a model that is "
            f"cut, got {config.init_lora_weights!r}; call get_peft_model before parallelize"
        )
