"""RotaryEmbedding against transformers' angles."""

from __future__ import annotations

import copy

import pytest
import torch

from pyparallel import reference
from pyparallel.layers import RotaryEmbedding
from pyparallel.layers.rotary_embedding import RopeScaling


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_angles_are_those_of_transformers(kind):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope = {"rope_type": kind, "rope_theta": 5000.0}
    if kind == "linear":
        rope |= {"factor": 4.0}
        scaling = RopeScaling("linear", 4.0)
    elif kind == "llama3":
        rope |= {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    else:
        scaling = None
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters=rope,
    )
    positions = torch.tensor([[0, 1, 5, 200], [3, 4, 300, 511]])
    q = torch.randn(2, 4, 2, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)
    ours = reference.rope(q, *RotaryEmbedding(16, 5000.0, scaling)(positions))
    # Angles up to 511 in fp32: the products differ by a rounding of 511 at most.
    torch.testing.assert_close(ours, expected, rtol=0, atol=511 * 2.0**-23 * 4)


def test_frequencies_survive_casts_copies_and_meta():
    whole = RotaryEmbedding(8, factors=[1.0, 2.0, 3.0, 4.0])
    positions = torch.arange(5).unsqueeze(0)
    with torch.device("meta"):
        meta = RotaryEmbedding(8, factors=[1.0, 2.0, 3.0, 4.0])
    for twin in (copy.deepcopy(whole).bfloat16(), meta.to_empty(device="cpu")):
        for actual, expected in zip(twin(positions), whole(positions), strict=True):
            assert torch.equal(actual, expected) and actual.dtype == torch.float32


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"rope_type: expected .* got 'yarn'"):
        RopeScaling("yarn")
