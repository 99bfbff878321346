"""What a quantized checkpoint keeps at 16 bits: read from its config, held and read as such."""

from __future__ import annotations

import pytest

from pyparallel.planner.engines import engine_of
from pyparallel.planner.hardware import cluster_of
from pyparallel.planner.inference_time import pass_works
from pyparallel.planner.kept import kept_parts
from pyparallel.planner.memory import stage_shards, weight_bytes
from pyparallel.planner.shape import model_shape
from pyparallel.planner.strategy import Inference, Strategy

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
ATTENTION = 64 * 16 * (4 + 2 + 2) + 64 * 64
MLP = 3 * 64 * 96
PARTS = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
PARTS += [f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"]


def quantized(**lists: object) -> dict:
    return {**CONFIG, "quantization_config": {"quant_method": "fp8", **lists}}


def held(config: dict) -> float:
    shape, strategy = model_shape(config), Strategy()
    return weight_bytes(stage_shards(shape, strategy, engine_of("vllm"))[0], "fp8")


@pytest.mark.parametrize(
    ("lists", "kept"),
    [
        ({}, 0),
        ({"modules_to_not_convert": None}, 0),
        ({"modules_to_not_convert": ["lm_head", *PARTS]}, ATTENTION + MLP),
        # A part of the matrices is none of the parts that are counted.
        ({"modules_to_not_convert": PARTS[1:]}, ATTENTION),
        ({"ignore": ["lm_head", "re:.*self_attn.*"]}, 3 * ATTENTION),
        # Not layer 12's, nor layer 1's of another stack.
        ({"ignore": ["layers.1.mlp"]}, MLP),
    ],
)
def test_kept_modules_are_held_at_16_bits(lists: dict, kept: int) -> None:
    assert held(quantized(**lists)) == held(CONFIG) + kept


def test_names_match_whole_parts() -> None:
    assert kept_parts(("layers.1.mlp",), 1) == (False, True)
    assert kept_parts(("layers.1.mlp",), 11) == (False, False)
    assert kept_parts(("self_attn",), 5) == (True, False)


def test_a_token_reads_them_at_16_bits() -> None:
    cluster, strategy = cluster_of("h100", 1), Strategy()
    work = Inference(1, 8, 1, "fp8")

    def read(config: dict) -> float:
        (stage,) = pass_works(
            model_shape(config),
            cluster,
            strategy,
            work,
            sequences=1.0,
            tokens=1,
            context=8.0,
            kernel="nccl",
        )
        return stage.read * cluster.gpu.bandwidth

    more = read(quantized(ignore=["self_attn"])) - read(CONFIG)
    assert more == pytest.approx(3 * ATTENTION, rel=1e-9)


def test_metas_405b_of_8_bits() -> None:
    """As vLLM 0.5.3 reported its first release, whose KV heads were twice there: 57.752 GiB a GPU."""
    shape = model_shape("meta-llama/Llama-3.1-405B-Instruct-FP8")
    attention = 2 * 16384 * 128 * (128 + 8)
    mlp = 3 * 16384 * 53248
    (shard,) = stage_shards(shape, Strategy(tp=8), engine_of("vllm"))
    assert shard.kept == (126 * attention + 2 * mlp) // 8


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"ignore": "lm_head"}, "ignore: expected a list of names, got 'lm_head'"),
        ({"modules_to_not_convert": [3]}, r"modules_to_not_convert: expected a list of names"),
        ({"ignore": ["re:("]}, r"expected an expression after 're:', got '\('"),
    ],
)
def test_other_lists_are_refused(lists: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        held(quantized(**lists))
