"""Small models of a type, with settings drawn from what its config class has.

A case is data: the type, and what is set in its config. What transformers itself can't build or run with
a setting is no case; the rest has to give transformers' numbers, or be refused in one line.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pyparallel.models.swap.plans import PLANS
from tests.transformers_models import randomize

# Those of load()'s own decoder; they are drawn more often.
OWN = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")
MOST_PARAMETERS = 500_000
VOCABULARY = 61
# One size under every name that config classes have for it.
SIZES: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "inner": ("intermediate_size", "n_inner", "ffn_dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
}
FIXED = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 60,
}
# (query heads, KV heads, size of a head): multi-head, grouped and uneven, one KV head.
HEADS = ((6, 6, 4), (9, 3, 4), (8, 2, 4), (5, 1, 4), (4, 2, 6))
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
ROTATIONS: tuple[dict[str, Any], ...] = (
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5},
    {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0},
    {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
)
# What is a plain switch of the architecture; others say what a call returns, or need more than a bit.
SWITCHES = (
    "attention_bias",
    "mlp_bias",
    "use_bias",
    "use_qkv_bias",
    "use_parallel_residual",
    "tie_word_embeddings",
    "qk_layernorm",
    "use_qk_norm",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "clip_qkv",
)
NUMBERS = {
    "rms_norm_eps": (1e-6, 1e-5, 1e-3),
    "layer_norm_eps": (1e-6, 1e-5, 1e-3),
    "layer_norm_epsilon": (1e-6, 1e-5, 1e-3),
    "norm_epsilon": (1e-6, 1e-5, 1e-3),
    "sliding_window": (None, 3, 5, 64),
    "partial_rotary_factor": (0.5, 1.0),
    "rotary_pct": (0.5, 1.0),
    "logit_scale": (0.5, 2.0),
    "logits_scaling": (0.5, 2.0),
    "embedding_multiplier": (1.0, 3.0),
    "residual_multiplier": (1.0, 0.5),
    "attention_multiplier": (0.5, 0.25),
    "final_logit_softcapping": (None, 30.0),
}


@dataclass(frozen=True)
class Case:
    """A model type and what is set in its config; ``dropped``: keys that config.json then lacks."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        return json.dumps({"type": self.kind, **self.options, "dropped": self.dropped})


def kinds() -> tuple[str, ...]:
    """Every causal type with a plan, ours or its own, whose layers are dense."""
    found = []
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if kind not in CONFIG_MAPPING or kind == "bert":
            continue
        plan = getattr(CONFIG_MAPPING[kind], "base_model_tp_plan", None) or {}
        experts = any("expert" in name or "moe" in style for name, style in plan.items())
        if (kind in PLANS or plan) and not experts:
            found.append(kind)
    return tuple(found)


def draw(kind: str, seed: int) -> Case:
    """A case of a type; the same of the same seed. Seed 0 is plain."""
    chance = random.Random(f"{kind} {seed}")
    known = vars(CONFIG_MAPPING[kind]()) if kind in CONFIG_MAPPING else {}
    heads, kv_heads, size = chance.choice(HEADS) if seed else HEADS[1]
    sizes = {
        "hidden": heads * size,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": size,
        "inner": chance.choice((50, 33, 64)) if seed else 50,
        "layers": chance.choice((1, 2, 3)) if seed else 2,
    }
    options = {name: value for name, value in FIXED.items() if _has(kind, name, known)}
    for what, value in sizes.items():
        options |= {name: value for name in SIZES[what] if _has(kind, name, known)}
    if kind == "gpt_neox":
        # A quarter of a head of 4 is no pair of features.
        options["rotary_pct"] = 0.5
    if seed:
        options |= _unusual(kind, known, chance)
    # An optional key may be absent: transformers then has its own default. (Those that change a shape
    # are in tests/models/test_config_keys.py.)
    dropped = [name for name in _OPTIONAL if name in options and seed and chance.random() < 0.2]
    return Case(kind, options, tuple(dropped))


_OPTIONAL = (
    "rms_norm_eps",
    "layer_norm_eps",
    "sliding_window",
    "hidden_act",
    "rope_parameters",
    "use_parallel_residual",
    "attention_bias",
    "mlp_bias",
)


def _has(kind: str, name: str, known: dict[str, Any]) -> bool:
    return name in known or hasattr(CONFIG_MAPPING[kind](), name)


def _unusual(kind: str, known: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SWITCHES:
        if isinstance(known.get(name), bool) and chance.random() < 0.5:
            found[name] = not known[name]
    for name, values in NUMBERS.items():
        if _has(kind, name, known) and chance.random() < 0.5:
            found[name] = chance.choice(values)
    for name in ("hidden_act", "activation_function", "hidden_activation"):
        if isinstance(known.get(name), str) and chance.random() < 0.4:
            found[name] = chance.choice(ACTIVATIONS)
    # Types with several kinds of layers keep a table a kind: left as it is.
    one_table = "rope_type" in (known.get("rope_parameters") or {})
    if one_table and chance.random() < 0.7:
        found["rope_parameters"] = dict(chance.choice(ROTATIONS))
    return found


def built(case: Case, folder: Path) -> nn.Module | None:
    """The dense model, saved in ``folder`` and read back from it; None where transformers has none."""
    try:
        config = CONFIG_MAPPING[case.kind](**case.options)
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[case.kind]
        cls = getattr(transformers, name)
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
        if size > MOST_PARAMETERS:
            return None
        model = randomize(cls(config)).eval()
        model.save_pretrained(folder)
        if case.dropped:
            file = folder / "config.json"
            content = json.loads(file.read_text())
            kept = {key: value for key, value in content.items() if key not in case.dropped}
            file.write_text(json.dumps(kept))
        found, report = cls.from_pretrained(folder, output_loading_info=True)
        # Other defaults are other shapes, or other tensors: then the folder is no model.
        if report["missing_keys"] or report["mismatched_keys"] or report["unexpected_keys"]:
            return None
        with torch.no_grad():
            logits = found(torch.tensor([[5, 9, 2]])).logits
        return found.eval() if logits.isfinite().all() and logits.shape[-1] == VOCABULARY else None
    except Exception:
        # Whatever transformers says of it, there is nothing to be equal to.
        return None
