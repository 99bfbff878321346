"""Small random transformers models of each family, for the tests of parallelize and of loading."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from pyparallel.testing import SEED

# 9 heads in 3 KV groups divide by neither 2 nor 4, and 3 KV heads are fewer than 4 ranks.
_HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "head_dim": 4}
_SIZES = {
    "vocab_size": 61,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 60,
}
_DECODER = {**_HEADS, **_SIZES, "intermediate_size": 50}
_BERT = {
    **_SIZES,
    "hidden_size": 36,
    "num_attention_heads": 6,
    "intermediate_size": 50,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_GPT2 = {
    **_SIZES,
    "n_embd": 36,
    "n_head": 6,
    "n_inner": 50,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
}

# Name: (model class, config class, configuration).
CASES: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "attention_bias": True}),
    "llama tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_DECODER, "tie_word_embeddings": True, "mlp_bias": True},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_DECODER, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2 upcast": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_GPT2, "reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**_SIZES, "hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 50},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "bert classes": ("BertForSequenceClassification", "BertConfig", {**_BERT, "num_labels": 3}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_DECODER, "sliding_window": 5}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_DECODER, "sliding_window": 5}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**_DECODER, "logit_scale": 0.5}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_DECODER, "sliding_window": None}),
    "phi": (
        "PhiForCausalLM",
        "PhiConfig",
        {**_DECODER, "num_key_value_heads": 9, "qk_layernorm": True},
    ),
    "glm": (
        "GlmForCausalLM",
        "GlmConfig",
        {**_DECODER, "attention_bias": True, "partial_rotary_factor": 0.5},
    ),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**_DECODER, "logits_scaling": 2.0}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {**_DECODER, "use_bias": True}),
}

GENERATES = tuple(name for name in CASES if not name.startswith("bert"))


def config_of(
    name: str, attention: str = "sdpa", **changes: object
) -> transformers.PreTrainedConfig:
    """The configuration of a case."""
    config = getattr(transformers, CASES[name][1])(**{**CASES[name][2], **changes})
    # A position's window is longer than its slots: the caches need not slide.
    config._attn_implementation = attention
    return config


def build(name: str, attention: str = "sdpa", **changes: object) -> nn.Module:
    """A dense model with every parameter random: no bias is 0 and no norm is 1."""
    model = class_of(name)(config_of(name, attention, **changes))
    return randomize(model).eval()


def class_of(name: str) -> type[nn.Module]:
    """The model class of a case."""
    return getattr(transformers, CASES[name][0])


def randomize(model: nn.Module) -> nn.Module:
    """Draw every parameter anew, the same in every process."""
    generator = torch.Generator().manual_seed(SEED + 7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            value = torch.randn(parameter.shape, generator=generator) * 0.25 + mean
            parameter.copy_(value)
    return model


def inputs(model: nn.Module, *, batch: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Tokens with a padded row, and labels as the model's loss takes them."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 60, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    classes = getattr(model, "num_labels", 0) if "SequenceClass" in type(model).__name__ else 0
    labels = torch.arange(batch) % classes if classes else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
