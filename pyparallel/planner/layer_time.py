"""Seconds of one layer for one micro-batch, forward and backward together.

Products: forward once, backward twice (of inputs and of weights). Attention: flash, causal, or where an
engine writes its scores out, two products and 13 bytes a score. Elementwise, a: 2 bytes: norms, residual
adds, rotation and the activation read and write what they work on. Recomputing a layer is its forward
once more, with its communication.

Messages of tp: two reductions forward and two backward of a t H bytes (all_reduce), or with sp the same
bytes as reduce_scatter and all_gather, and one more all_gather of each column layer's input in backward,
which runs under a product. Messages of cp: keys and values, sent round, hidden under attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyparallel.planner.communication import collective_seconds
from pyparallel.planner.engines import Engine
from pyparallel.planner.hardware import Cluster
from pyparallel.planner.roofline import (
    Rates,
    attention_backward_seconds,
    attention_seconds,
    matmul_seconds,
    moved_seconds,
)
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import BYTES, Strategy, Training
from pyparallel.planner.weights import largest_rank, layer_shard


@dataclass(frozen=True)
class LayerTime:
    """Of the average layer of a model, which may have layers of experts and dense ones.

    Attributes:
        launch: what the host needs beside what keeps the GPU busy.
    """

    matmuls: float
    attention: float
    elementwise: float
    recompute: float
    tensor: float
    context: float
    launch: float


def layer_time(
    shape: ModelShape,
    strategy: Strategy,
    training: Training,
    cluster: Cluster,
    engine: Engine,
    rates: Rates,
) -> LayerTime:
    """Seconds of a layer on the tp rank that holds the most of it."""
    gpu, dtype = cluster.gpu, training.dtype
    tokens = strategy.micro_batch * training.sequence / strategy.cp
    moe_share = shape.moe_layers / shape.layers
    rank = largest_rank(shape, strategy.tp)
    shard = layer_shard(shape, strategy.tp, rank, False) if moe_share < 1 else None
    expert = layer_shard(shape, strategy.tp, rank, True) if moe_share else None
    some = shard or expert
    features = (1 - moe_share) * (shard.ffn if shard else 0)
    visited = shape.top_k * shape.expert_ffn + shape.shared_ffn
    features += moe_share * visited / strategy.tp
    query, kv = some.query_heads * shape.head_dim, some.kv_heads * shape.head_dim

    def product(n: float, k: float) -> float:
        # Frozen weights have no gradients: backward is of the inputs alone.
        forward = matmul_seconds(tokens, n, k, gpu, rates, dtype)
        return forward * (2 if training.frozen else 3)

    wide = (shape.mlp_matrices - 1) * features
    matmuls = product(query + 2 * kv, shape.hidden) + product(shape.hidden, query)
    matmuls += product(wide, shape.hidden) + product(shape.hidden, features)
    forward, backward, written = _attention(shape, strategy, training, cluster, engine, rates)
    between = tokens / strategy.sequence_shards
    # A norm and a residual add twice: 2 + 3 passes over a t H; rotation of q and k; the activation.
    once = 2.0 * (10 * between * shape.hidden + tokens * (2 * (query + kv) + wide + features))
    # Each product's input is written twice, for forward and transposed: of 8 bits by what makes it; of
    # 4 bits it is read for its largest value, then read again and written.
    once += (
        {"fp8": 2.0, "fp4": 5.0}.get(dtype, 0.0) * tokens * (2 * shape.hidden + query + features)
    )
    moved = moved_seconds(once, gpu, rates, calls=8) + written
    # Backward reads both sides of what forward read and wrote.
    elementwise = moved + 2 * moved
    message = rates.messages * _tensor_message(shape, strategy, training, tokens, cluster)
    hidden = rates.overlap if strategy.sp and engine.tensor_hidden else 0.0
    tensor = 4 * message * (1 - hidden)
    recompute = 0.0
    if strategy.recompute == "layers":
        recompute = matmuls / 3 + forward + moved + 2 * message * (1 - hidden)
    elif strategy.recompute == "attention" and not engine.flash:
        recompute = forward + written
    ring = _ring_seconds(shape, strategy, tokens, cluster, kv)
    context = max(0.0, ring - forward) + max(0.0, 2 * ring - backward)
    attention = forward + backward
    # What the GPU is busy with in each pass. Messages that are waited for hide no launches: the next
    # kernel is launched when they are done.
    once = matmuls / (2 if training.frozen else 3) + forward + moved
    passes = [once, matmuls + attention + elementwise - once]
    if strategy.recompute == "layers":
        passes.append(once)
    launch = sum(max(0.0, rates.host_s - busy) for busy in passes)
    return LayerTime(matmuls, attention, elementwise, recompute, tensor, context, launch)


def _attention(
    shape: ModelShape,
    strategy: Strategy,
    training: Training,
    cluster: Cluster,
    engine: Engine,
    rates: Rates,
) -> tuple[float, float, float]:
    """Seconds of forward and backward, and of scores that are written out."""
    gpu, length = cluster.gpu, training.sequence
    tokens = strategy.micro_batch * length / strategy.cp
    heads = layer_shard(
        shape, strategy.tp, largest_rank(shape, strategy.tp), shape.experts > 0
    ).query_heads
    if engine.flash:
        seen = length / 2
        if shape.window and shape.windowed_layers and shape.window < length:
            share = shape.windowed_layers / shape.layers
            seen = (1 - share) * length / 2 + share * shape.window
        slower = replace(rates, attention=rates.attention * engine.attention_share)
        cut = (tokens, seen, heads, shape.head_dim, gpu, slower)
        return attention_seconds(*cut), attention_backward_seconds(*cut), 0.0
    # Two products a head of [S, D] by [D, S]; heads are a batch of them.
    batch = strategy.micro_batch * heads
    each = 2 * matmul_seconds(batch * length, length, shape.head_dim, gpu, rates, "bf16")
    scores = batch * length * length
    return each, 2 * each, moved_seconds(13.0 * scores, gpu, rates, calls=3)


def _tensor_message(
    shape: ModelShape, strategy: Strategy, training: Training, tokens: float, cluster: Cluster
) -> float:
    """One reduction of all tokens' hidden states over tp, as all_reduce or its two halves.

    What a product of 8 bits takes is gathered as 8 bits.
    """
    size = 2.0 * tokens * shape.hidden
    if not strategy.sp:
        return collective_seconds("all_reduce", size, strategy.tp, cluster)
    gathered = size * min(1.0, BYTES[training.dtype] / 2)
    reduced = collective_seconds("reduce_scatter", size, strategy.tp, cluster)
    return reduced + collective_seconds("all_gather", gathered, strategy.tp, cluster)


def _ring_seconds(
    shape: ModelShape, strategy: Strategy, tokens: float, cluster: Cluster, kv: float
) -> float:
    """Keys and values sent to cp - 1 others in turn."""
    if strategy.cp == 1:
        return 0.0
    inside = max(1, cluster.gpus_per_node // strategy.tp)
    size = 2.0 * 2 * tokens * kv
    each = collective_seconds(
        "send", size, strategy.cp, cluster, ranks_per_node=min(inside, strategy.cp)
    )
    return (strategy.cp - 1) * each


def head_seconds(
    shape: ModelShape,
    strategy: Strategy,
    training: Training,
    cluster: Cluster,
    rates: Rates,
    vocab: int,
) -> tuple[float, float]:
    """The head of one micro-batch, forward and backward: products of 16 bits, and the loss."""
    tokens = strategy.micro_batch * training.sequence / strategy.cp
    forward = matmul_seconds(tokens, vocab, shape.hidden, cluster.gpu, rates, "bf16")
    # The loss reads logits twice, its gradient reads and writes them: 16 bits, and fp32 of some.
    moved = moved_seconds(12.0 * tokens * vocab, cluster.gpu, rates, calls=6)
    return 3 * forward, moved
