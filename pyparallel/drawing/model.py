"""The parallel modules that a picture is of: one layer and both tables, without storage."""

from __future__ import annotations

from dataclasses import replace

import torch

from pyparallel.comm.group import Group
from pyparallel.comm.recorded import RecordedCommunicator
from pyparallel.cut.shares import Shares
from pyparallel.layers.rotary_embedding import RopeScaling
from pyparallel.models.config import DecoderConfig
from pyparallel.models.decoder import Decoder
from pyparallel.planner.shape import ModelShape


def config_of(shape: ModelShape) -> DecoderConfig:
    """The decoder of a planner's shape; what no picture shows is anything.

    Raises:
        ValueError: a model of experts, which has no modules yet.
    """
    if shape.experts:
        raise ValueError(
            f"model: expected a dense model, got {shape.name} with {shape.experts} experts a "
            f"layer, of which there are no modules yet"
        )
    return DecoderConfig(
        family="llama",
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_positions=shape.max_positions,
        activation="swiglu" if shape.gated else "gelu",
        norm=shape.norm,
        norm_eps=1e-5,
        qkv_bias=shape.qkv_bias,
        out_bias=shape.out_bias,
        mlp_bias=shape.mlp_bias,
        qk_norm=shape.qk_norm,
        rotary_dim=0 if shape.learned_positions else shape.head_dim,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(),
        parallel_residual=False,
        windows=(None,) * shape.layers,
        tied=shape.tied,
        stop_ids=(),
    )


def decoder_of(
    config: DecoderConfig,
    *,
    tp: int,
    rank: int = 0,
    shares: Shares = (),
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Decoder, RecordedCommunicator]:
    """One layer of the model, its embedding and its head as rank ``rank`` of tp has them.

    Raises:
        ValueError: more ranks than heads, or shares that are none.
    """
    communicator = RecordedCommunicator("tp", rank, tp)
    one = replace(
        config,
        num_layers=1,
        windows=config.windows[:1],
        embedding_dropout=0.0,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    group = Group.over(communicator, shares)
    model = Decoder(one, "meta", dtype, group=group, sequence_parallel=sequence_parallel)
    return model, communicator
