"""What a rank holds while it answers: weights, the KV cache, and the activations of a prefill.

KV bytes of a sequence on one rank: 2 a L_stage G_r D tokens / cp. Of the prefill's activations one
layer's are alive at a time, a token's widest being

    a (2 H + max(D (2 N_r + 2 G_r), F_r matrices))        residual, norm, and attention's or the MLP's

and logits are made of each sequence's last token alone.
"""

from __future__ import annotations

import math

from pyparallel.planner.engines import PYPARALLEL, Engine
from pyparallel.planner.hardware import Gpu
from pyparallel.planner.memory import (
    RankMemory,
    overhead_bytes,
    stage_shards,
    usable_bytes,
    weight_bytes,
)
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import BYTES, Inference, Strategy
from pyparallel.planner.weights import StageShard, largest_rank, layer_shard


def inference_memory(
    shape: ModelShape,
    strategy: Strategy,
    inference: Inference,
    *,
    engine: Engine = PYPARALLEL,
    chunk: int | None = None,
) -> list[RankMemory]:
    """The peak of each pp rank, of its tp rank that holds the most.

    Args:
        chunk: tokens of a prefill that run at once; by default the whole batch's prompts.

    Raises:
        ValueError: more stages than layers, or more tp ranks than heads.
    """
    together = chunk or inference.batch * inference.prompt
    tokens = together / strategy.cp
    found = []
    for place, shard in enumerate(stage_shards(shape, strategy, engine)):
        terms = {
            "weights": weight_bytes(shard, inference.weight_dtype),
            "kv cache": inference.batch * sequence_bytes(shape, strategy, inference, shard, engine),
        }
        activations = tokens * prefill_bytes(shape, strategy) * (1 + engine.fragmentation)
        terms["activations"] = activations
        terms["logits"] = inference.batch * shard.vocab * (2.0 + engine.logit_bytes)
        # Hidden states to and from the neighbours, and the gathered input of a column layer.
        size = 2.0 * shape.hidden * tokens
        terms["buffers"] = size * (strategy.sp + 2 * (strategy.pp > 1) / strategy.sequence_shards)
        terms["overhead"] = overhead_bytes(strategy, engine)
        found.append(RankMemory(place, terms))
    return found


def sequence_bytes(
    shape: ModelShape,
    strategy: Strategy,
    inference: Inference,
    shard: StageShard,
    engine: Engine = PYPARALLEL,
) -> float:
    """The KV cache of one sequence, when its answer is done, on one rank of a stage."""
    length = inference.length
    full = shard.layers * length
    if engine.window_cached and shape.windowed_layers:
        windowed = shard.layers * shape.windowed_layers / shape.layers
        full -= windowed * max(0, length - shape.window)
    heads = layer_shard(shape, strategy.tp, largest_rank(shape, strategy.tp)).kv_heads
    return 2 * full * heads * shape.head_dim * BYTES[inference.kv_dtype] / strategy.cp


def prefill_bytes(shape: ModelShape, strategy: Strategy) -> float:
    """Activations of one token on its way through one layer, of 16 bits."""
    shard = layer_shard(shape, strategy.tp, largest_rank(shape, strategy.tp), shape.experts > 0)
    attention = shape.head_dim * 2 * (shard.query_heads + shard.kv_heads)
    features = shard.ffn
    if shape.experts:
        features = shape.top_k * (shape.expert_ffn / strategy.tp + shape.hidden)
        features += shape.shared_ffn / strategy.tp
    widest = max(attention, features * shape.mlp_matrices)
    return 2 * (2 * shape.hidden / strategy.sequence_shards + widest)


def cache_room(
    shape: ModelShape,
    strategy: Strategy,
    gpu: Gpu,
    *,
    engine: Engine,
    weight_dtype: str = "bf16",
    utilization: float = 0.9,
    step_tokens: int = 8192,
    sequences: int = 256,
) -> float:
    """Bytes that a serving program sets aside for the KV cache of each GPU, of the tightest stage.

    It takes ``utilization`` of the GPU, loads the weights, and runs a step of the most tokens and
    sequences to see what else is needed; what is left is cache. Below 0: it does not start.
    """
    work = Inference(1, step_tokens, 1, weight_dtype)
    memory = inference_memory(shape, strategy, work, engine=engine)
    rooms = []
    for each, shard in zip(memory, stage_shards(shape, strategy, engine), strict=True):
        needed = each.total - each.terms["kv cache"] - each.terms["logits"]
        needed += sequences * shard.vocab * (2.0 + engine.logit_bytes)
        rooms.append(utilization * usable_bytes(gpu) - needed)
    return min(rooms)


def cache_tokens(
    shape: ModelShape, strategy: Strategy, room: float, *, kv_dtype: str = "bf16"
) -> int:
    """How many tokens fit into ``room`` bytes of each GPU; 0 where there is no room."""
    heads = layer_shard(shape, strategy.tp, largest_rank(shape, strategy.tp)).kv_heads
    layers = math.ceil(shape.layers / strategy.pp)
    each = 2 * layers * heads * shape.head_dim * BYTES[kv_dtype] / strategy.cp
    return max(0, int(room / each))
