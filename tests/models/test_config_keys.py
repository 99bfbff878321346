"""config.json: every key absent, null, of another type or out of range, held against transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pyparallel.checkpoint.source import CheckpointError
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.config import from_hugging_face
from pyparallel.models.config_keys import SETTINGS, complete
from pyparallel.models.load import load
from tests.transformers_models import randomize

IDS = torch.tensor([[3, 7, 11, 2, 9, 5, 8, 8, 1]])
# Sizes that differ from the defaults; no bias, no window: what is absent does not change a shape.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 3},
    "gpt2": {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 32, "vocab_size": 17},
    "gpt_neox": {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 20},
}
for _name in ("mistral", "qwen2", "qwen3"):
    SIZES[_name] = SIZES["llama"]
for _name in ("llama", "mistral", "qwen2", "qwen3", "gpt_neox"):
    SIZES[_name] = {
        **SIZES[_name],
        "num_hidden_layers": 2,
        "max_position_embeddings": 32,
        "vocab_size": 17,
    }
for _name in ("mistral", "qwen2", "qwen3"):
    SIZES[_name] = {**SIZES[_name], "num_key_value_heads": 3}
SIZES["mistral"]["sliding_window"] = 4
SIZES["gpt_neox"]["rotary_pct"] = 0.5
# Keys whose absence gives a model too large to compare, or one of other tensors: refused by name.
NEEDED = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "n_embd",
    "n_head",
    "n_layer",
    "n_positions",
    "model_type",
}
NEEDED_BY = {"mistral": {"num_key_value_heads"}, "qwen2": {"num_key_value_heads"}}
NEEDED_BY["qwen3"] = {"num_key_value_heads", "head_dim"}


def class_of(model_type: str) -> type[transformers.PreTrainedConfig]:
    return transformers.CONFIG_MAPPING[model_type]


def variants(model_type: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A written config.json, without each of its keys, and without all that may be absent."""
    written = json.loads((class_of(model_type)(**SIZES[model_type])).to_json_string())
    # In the old spelling too: the rotary settings beside the others.
    written = {"architectures": _architectures(model_type), **written}
    needed = NEEDED | NEEDED_BY.get(model_type, set()) | {"architectures"}
    yield "whole", written
    for name in written:
        if name not in needed:
            yield f"without {name}", {k: v for k, v in written.items() if k != name}
    yield "without all", {k: v for k, v in written.items() if k in needed}
    if "rope_parameters" in written:
        flat = {k: v for k, v in written.items() if k != "rope_parameters"}
        base = "rotary_emb_base" if model_type == "gpt_neox" else "rope_theta"
        yield "flat", {**flat, base: 500.0}
        yield "not its own", {**flat, "rope_theta": 300.0, "partial_rotary_factor": 1.0}
        linear = {"type": "linear", "factor": 3.0}
        both = {
            "rope_scaling": linear,
            "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        }
        yield "scaling before parameters", {**flat, **both}
    if model_type == "mistral":
        # AutoConfig makes a Ministral of it, with windows where they are listed.
        yield "windows listed", {**written, "layer_types": ["sliding_attention", "full_attention"]}


def _architectures(model_type: str) -> list[str]:
    return [type(transformers.AutoModelForCausalLM.from_config(_tiny(model_type))).__name__]


def _tiny(model_type: str) -> transformers.PreTrainedConfig:
    return class_of(model_type)(**SIZES[model_type])


def logits_of(folders: list[Path]) -> list[Tensor | str]:
    mesh = init_mesh(tp=1)
    found: list[Tensor | str] = []
    with torch.no_grad():
        for folder in folders:
            try:
                found.append(load(folder, mesh)(IDS))
            except ValueError as error:
                found.append(str(error))
    return found


def folder_of(root: Path, model: torch.nn.Module, name: str, config: dict[str, Any]) -> Path:
    folder = root / name.replace(" ", "_")
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model_type", SETTINGS)
def test_absent_keys_are_transformers_defaults(model_type: str, tmp_path: Path) -> None:
    """One at a time, all together, and in the old spellings: transformers' logits on the same folder."""
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    folders, expected = [], []
    for name, config in variants(model_type):
        # Tensors as this config's model has them: a bias or a wider key that a default adds.
        model = transformers.AutoModelForCausalLM.from_config(
            class_of(model_type).from_dict(config)
        )
        folders.append(folder_of(tmp_path, randomize(model).eval(), name, config))
        dense = transformers.AutoModelForCausalLM.from_pretrained(folders[-1]).eval()
        with torch.no_grad():
            expected.append(dense(IDS).logits)
    (found,) = launch(logits_of, 1, folders, threads=1)
    for folder, got, want in zip(folders, found, expected, strict=True):
        assert isinstance(got, Tensor), (folder.name, got)
        assert (got - want).abs().max() < 2e-5, folder.name


@pytest.mark.parametrize("model_type", SETTINGS)
def test_the_table_is_transformers_own(model_type: str) -> None:
    """Every default, the sizes' too."""
    ours, theirs = complete({"model_type": model_type}), class_of(model_type)()
    made = {"rope_scaling", "head_dim", "partial_rotary_factor", "original_max_position_embeddings"}
    for name in SETTINGS[model_type]:
        if name not in made and name in ours:
            value = getattr(theirs, name, None)
            if name in ("sliding_window", "layer_types") and model_type.startswith("qwen"):
                continue  # Their class rewrites both by use_sliding_window.
            if name == "num_key_value_heads" and ours[name] is None:
                value = None
            if name in ("attention_bias", "mlp_bias") and value is None:
                value = False
            assert ours[name] == value, name
    config = from_hugging_face({"model_type": model_type})
    assert config.num_layers == theirs.num_hidden_layers
    assert config.hidden_size == theirs.hidden_size
    assert config.num_kv_heads == getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)


WRONG = [
    ("llama", {"hidden_size": "64"}, "hidden_size: expected an integer"),
    ("llama", {"hidden_size": 64.0}, "hidden_size: expected an integer"),
    ("llama", {"hidden_size": True}, "hidden_size: expected an integer"),
    ("llama", {"hidden_size": None}, "hidden_size: expected an integer"),
    ("llama", {"num_hidden_layers": 2**31}, "num_hidden_layers: expected an integer from 1"),
    ("llama", {"num_hidden_layers": 10**400}, "num_hidden_layers: expected an integer from 1"),
    (
        "llama",
        {"rms_norm_eps": float("nan")},
        "rms_norm_eps: expected a number with a point from 0 to 1, got nan",
    ),
    (
        "llama",
        {"rms_norm_eps": -1e-5},
        "rms_norm_eps: expected a number with a point from 0 to 1, got -1e-05",
    ),
    (
        "llama",
        {"rms_norm_eps": float("inf")},
        "rms_norm_eps: expected a number with a point from 0 to 1, got inf",
    ),
    (
        "gpt2",
        {"layer_norm_epsilon": -1.0},
        "layer_norm_epsilon: expected a number with a point from 0 to 1",
    ),
    (
        "gpt_neox",
        {"layer_norm_eps": "x"},
        "layer_norm_eps: expected a number with a point from 0 to 1, got 'x'",
    ),
    ("llama", {"rope_theta": -1.0}, "rope_theta: expected a number from 1e-06"),
    ("llama", {"rope_theta": 0}, "rope_theta: expected a number from 1e-06"),
    ("llama", {"rope_theta": None}, "rope_theta: expected a number from 1e-06"),
    ("llama", {"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta: expected a number"),
    ("llama", {"rope_scaling": [1]}, "rope_scaling: expected an object or null, got [1]"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor: expected a number"),
    ("llama", {"rope_scaling": {"type": 3, "factor": 2.0}}, "type: expected a string"),
    ("llama", {"head_dim": 0}, "head_dim: expected an integer from 1"),
    ("qwen3", {"head_dim": None}, "head_dim: expected an integer from 1"),
    ("mistral", {"num_key_value_heads": None}, "num_key_value_heads: expected an integer"),
    ("mistral", {"sliding_window": 0}, "sliding_window: expected an integer from 1"),
    ("llama", {"eos_token_id": "2"}, "eos_token_id: expected an integer or a list of integers"),
    ("llama", {"eos_token_id": [1, 2.5]}, "eos_token_id: expected an integer or a list"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false"),
    ("llama", {"hidden_act": "nonsense"}, "hidden_act: expected one of"),
    (
        "llama",
        {"num_attention_heads": 7},
        "hidden_size: expected a multiple of num_attention_heads",
    ),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention: expected False"),
    ("gpt_neox", {"rotary_pct": 0.0}, "rotary_pct: expected a number from"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 32}, "layer_types: expected full_attention"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: expected full_attention or"),
    ("qwen2", {"layer_types": 5}, "layer_types: expected a list of strings or null"),
    ("qwen2", {"quantization_config": 5}, "quantization_config: expected an object"),
    (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
            }
        },
        "expected low_freq_factor below high_freq_factor",
    ),
]


@pytest.mark.parametrize(("model_type", "change", "words"), WRONG)
def test_a_wrong_value_is_named(model_type: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as failure:
        from_hugging_face({"model_type": model_type, **change})
    assert words in str(failure.value)
    assert "\n" not in str(failure.value)
    assert not isinstance(failure.value, CheckpointError)


def test_gpt2_takes_the_names_of_the_others() -> None:
    """As transformers' attribute_map: they win over its own."""
    theirs = transformers.GPT2Config(hidden_size=64, n_embd=32, num_hidden_layers=3)
    ours = from_hugging_face(
        {"model_type": "gpt2", "hidden_size": 64, "n_embd": 32, "num_hidden_layers": 3, "n_head": 4}
    )
    assert (ours.hidden_size, ours.num_layers) == (theirs.n_embd, theirs.n_layer) == (64, 3)


def test_keys_that_a_type_has_not_are_not_read() -> None:
    for model_type in ("mistral", "qwen2"):
        config = from_hugging_face(
            {"model_type": model_type, "attention_bias": True, "mlp_bias": True}
        )
        assert not config.out_bias
        assert not config.mlp_bias
