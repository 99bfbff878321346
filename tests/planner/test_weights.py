"""Counted parameters are those that the modules of pyparallel.models allocate, on every rank."""

from __future__ import annotations

import random

import pytest
import torch

from pyparallel.comm.group import Group
from pyparallel.comm.local_engine import LocalCommunicator
from pyparallel.models.config import from_hugging_face
from pyparallel.models.decoder import Decoder
from pyparallel.models.stage import stages_of
from pyparallel.planner.shape import model_shape
from pyparallel.planner.weights import (
    largest_rank,
    layer_shard,
    rank_stages,
    stage_layers,
    stage_shard,
)


def random_config(seed: int) -> dict:
    """A small decoder of a random family, with heads, features and vocabulary that divide by nothing."""
    draw = random.Random(seed)
    kv = draw.choice((1, 2, 3, 5))
    heads = kv * draw.choice((1, 2, 3, 4))
    head_dim = draw.choice((4, 6, 8))
    layers, tied = draw.randint(2, 7), draw.random() < 0.5
    vocab, ffn = draw.randint(40, 300), draw.randint(20, 700)
    kind = draw.choice(("llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox"))
    if kind == "gpt2":
        return {
            "model_type": kind,
            "n_embd": heads * head_dim,
            "n_head": heads,
            "n_layer": layers,
            "n_inner": ffn,
            "vocab_size": vocab,
            "n_positions": draw.randint(8, 64),
            "tie_word_embeddings": tied,
        }
    return {
        "model_type": kind,
        "hidden_size": draw.randint(3, 40) * 2 if kind != "gpt_neox" else heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "attention_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
    }


def counted(model: Decoder) -> int:
    """Parameters of a module; a shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("shares", [(3, 1), (5, 3, 1)])
@pytest.mark.parametrize("seed", range(200, 206))
def test_counts_of_unequal_shares_too(seed, shares):
    config = random_config(seed) | {"num_attention_heads": 6, "num_key_value_heads": 2, "n_head": 6}
    config |= {"n_embd": 48, "hidden_size": 48, "head_dim": 8}
    decoder, shape = from_hugging_face(config), model_shape(config)
    for rank in range(len(shares)):
        group = Group(rank, len(shares), LocalCommunicator(), shares=shares)
        expected = counted(Decoder(decoder, "meta", torch.bfloat16, group=group))
        assert stage_shard(shape, shares, rank, [0], stage_layers(shape, 1)).total == expected


@pytest.mark.parametrize("seed", range(40))
def test_counts_are_what_the_modules_allocate(seed):
    config = random_config(seed)
    decoder, shape = from_hugging_face(config), model_shape(config)
    draw = random.Random(seed)
    pp, tp = draw.randint(1, min(3, shape.layers)), draw.randint(1, 5)
    virtual = draw.choice((1, 2)) if 2 * pp <= shape.layers else 1
    tp = min(tp, shape.heads)
    stages = stages_of(decoder, pp * virtual)
    assert [stage.layers for stage in stages] == list(stage_layers(shape, pp * virtual))
    for rank in range(tp):
        group = Group(rank, tp, LocalCommunicator())
        for place in range(pp):
            held = rank_stages(pp, place, virtual)
            expected = 0
            for stage in held:
                model = Decoder(decoder, "meta", torch.bfloat16, group=group, stage=stages[stage])
                expected += counted(model)
            shard = stage_shard(shape, tp, rank, held, stage_layers(shape, pp * virtual))
            assert shard.total == expected, (config, tp, rank, held)


def test_every_parameter_is_somewhere():
    shape = model_shape("llama-3.1-8b")
    layers = stage_layers(shape, 4)
    held = sum(
        stage_shard(shape, 8, rank, [stage], layers).total
        for rank in range(8)
        for stage in range(4)
    )
    # Norms alone are on every rank.
    norms = (2 * shape.layers + 1) * shape.hidden
    assert held == shape.parameters() + 7 * norms


def test_kv_heads_are_replicated_beyond_their_number():
    shape = model_shape("llama-3.1-8b")
    assert [layer_shard(shape, 16, rank).kv_heads for rank in range(16)] == [1] * 16
    assert layer_shard(shape, 16, 0).query_heads == 2


def test_experts_are_cut_by_their_features():
    shape = model_shape("mixtral-8x7b")
    assert sum(layer_shard(shape, 8, rank, True).mlp for rank in range(8)) == 8 * 3 * 4096 * 14336


def test_stages_by_number_or_by_cost():
    shape = model_shape("llama-3.1-405b")
    assert [len(each) for each in stage_layers(shape, 9, "even")] == [14] * 9
    # The head costs as much as two layers and a half.
    assert len(stage_layers(model_shape("llama-3.1-8b"), 4)[-1]) == 6
    with pytest.raises(ValueError, match="stages: expected 1 to 126"):
        stage_layers(shape, 127)
    with pytest.raises(ValueError, match="stages: expected 1 to 126"):
        stage_layers(shape, 127, "even")
    with pytest.raises(ValueError, match="balance: expected one of compute"):
        stage_layers(shape, 2, "odd")
    with pytest.raises(ValueError, match="use at most tp=128"):
        layer_shard(shape, 129, 0)
    # Refused before anything as long as that is made.
    with pytest.raises(ValueError, match="use at most tp=128"):
        largest_rank(shape, 2**31)
    for balance in ("compute", "even", "threshold"):
        with pytest.raises(ValueError, match="stages: expected 1 to 126"):
            stage_layers(shape, 2**31, balance)
