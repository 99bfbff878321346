"""Shapes by name and by config: counted parameters, loose names, what is refused."""

from __future__ import annotations

import json

import pytest

from pyparallel.planner.names import shipped
from pyparallel.planner.shape import model_shape

# Billions, as the models' cards have them; GPT-2's are exact counts.
PUBLISHED = {
    "Llama-3.1-8B": 8.03,
    "Llama-3.1-70B": 70.554,
    "Llama-3.1-405B": 405.85,
    "Llama-3.2-1B": 1.236,
    "Llama-3.2-3B": 3.213,
    "Qwen2.5-0.5B": 0.494,
    "Qwen2.5-1.5B": 1.544,
    "Qwen2.5-3B": 3.086,
    "Qwen2.5-7B": 7.616,
    "Qwen2.5-72B": 72.706,
    "Qwen3-4B": 4.022,
    "Qwen3-8B": 8.19,
    "Qwen3-30B-A3B": 30.53,
    "Qwen3-235B-A22B": 235.09,
    "Mistral-7B": 7.248,
    "Mistral-Large": 122.61,
    "Mixtral-8x7B": 46.703,
    "Mixtral-8x22B": 140.62,
    "gpt-oss-120b": 116.83,
    "SmolLM2-135M": 0.134515008,
    "SmolLM2-360M": 0.36182112,
    "SmolLM2-1.7B": 1.711376384,
    "GPT-3-175B": 174.6,
    "GPT-2": 0.124439808,
    "GPT-2-xl": 1.5576112,
    "Gemma-2-9B": 9.242,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 100,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    # Cards round to three or four digits.
    assert model_shape(name).parameters() / 1e9 == pytest.approx(PUBLISHED[name], rel=1e-3)


def test_every_shipped_model_says_where_it_is_from():
    for name, entry in shipped("models").items():
        assert entry["source"], name
        assert model_shape(name).parameters() > 0


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("llama 3.1 405b", "Llama-3.1-405B"),
        ("GPT3", "GPT-3-175B"),
        ("mistralai/Mixtral-8x7B-v0.1", "Mixtral-8x7B"),
        ("smollm2-135m", "SmolLM2-135M"),
        ("gpt2", "GPT-2"),
    ],
)
def test_names_are_matched_loosely(asked, found):
    assert model_shape(asked).name == found


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"no model is called 'llama-3.1-8'.*Llama-3.1-8B"):
        model_shape("llama-3.1-8")


def test_active_weights_of_experts_are_those_a_token_visits():
    # 12.9 B active of Mixtral 8x7B, of which the embedding, a lookup, is 0.13.
    active = model_shape("mixtral-8x7b").matmul_weights()
    assert active / 1e9 == pytest.approx(12.88 - 0.131, rel=2e-3)


def test_config_json_by_path_folder_and_content(tmp_path):
    place = tmp_path / "small" / "config.json"
    place.parent.mkdir()
    place.write_text(json.dumps(LLAMA))
    by_folder = model_shape(str(place.parent))
    assert by_folder.name == "small"
    assert by_folder == model_shape(place)
    assert model_shape(LLAMA).parameters() == by_folder.parameters()
    attention = 48 * 8 * (2 * 6 + 2 * 2)
    assert by_folder.layer_parameters() == attention + 3 * 48 * 80 + 2 * 48
    assert by_folder.parameters() == 2 * by_folder.layer_parameters() + 2 * 100 * 48 + 48


def test_config_of_experts():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    shape = model_shape({**LLAMA, "model_type": "mixtral", **experts})
    mlp = 4 * 3 * 48 * 80 + 48 * 4
    assert shape.layer_parameters(True) == 48 * 8 * 16 + mlp + 2 * 48


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type: expected one of llama.*got 'mamba'"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers: expected at most 512"),
        ({"hidden_size": -1}, "hidden_size: expected an integer from 1"),
        ({"num_key_value_heads": 4}, "kv_heads: expected a divisor of 6 heads, got 4"),
        ({"model_type": "mixtral", "num_local_experts": 4}, "num_experts_per_tok"),
        ({"model_type": "phi3", "vocab_size": None}, "vocab_size: expected an integer"),
    ],
)
def test_a_config_that_is_none_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        model_shape({**LLAMA, **change})


def test_a_file_that_is_no_config_is_refused(tmp_path):
    place = tmp_path / "config.json"
    with pytest.raises(ValueError, match="no such file"):
        model_shape(place)
    for text in ("[1]", "{", "[" * 100000):
        place.write_text(text)
        with pytest.raises(ValueError, match="JSON"):
            model_shape(place)
