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

# Bytes that operands of 8 or 4 bits cost each number of a product's input: written twice, for forward
# and transposed, by what makes it; of 4 bits, also read for its largest value, then read again.
QUANTIZED = {"fp8": 2.0, "fp4": 5.0}


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
    query, kv, features = _widths(shape, strategy)
    wide = (shape.mlp_matrices - 1) * features
    products = sum(
        matmul_seconds(tokens, n, k, gpu, rates, dtype)
        for n, k in (
            (query + 2 * kv, shape.hidden),
            (shape.hidden, query),
            (wide, shape.hidden),
            (shape.hidden, features),
        )
    )
    # Frozen weights have no gradients: backward is of the inputs alone.
    matmuls = products * (2 if training.frozen else 3)
    forward, backward, written = _attention(shape, strategy, training, cluster, engine, rates)
    between = tokens / strategy.sequence_shards
    # A norm and a residual add twice: 2 + 3 passes over a t H; rotation of q and k; the activation.
    num_bytes = 2.0 * (10 * between * shape.hidden + tokens * (2 * (query + kv) + wide + features))
    num_bytes += QUANTIZED.get(dtype, 0.0) * tokens * (2 * shape.hidden + query + features)
    moved = moved_seconds(num_bytes, gpu, rates, calls=8) + written
    # Backward reads both sides of what forward read and wrote.
    elementwise = moved + 2 * moved
    hidden = rates.overlap if strategy.sp and engine.tensor_hidden else 0.0
    message = _tensor_message(shape, strategy, training, tokens, cluster)
    waited = 2 * rates.messages * message * (1 - hidden)
    ring = _ring_seconds(strategy, tokens, cluster, kv)
    context = max(0.0, ring - forward) + max(0.0, 2 * ring - backward)
    # What the GPU is busy with in each pass. Messages that are waited for hide no launches: the next
    # kernel is launched when they are done.
    first = products + forward + moved
    passes = [first, matmuls + forward + backward + elementwise - first]
    recompute = 0.0
    if strategy.recompute == "layers":
        recompute = first + waited
        passes.append(first)
    elif strategy.recompute == "attention" and not engine.flash:
        recompute = forward + written
    launch = sum(max(0.0, rates.host_s - busy) for busy in passes)
    attention = forward + backward
    return LayerTime(matmuls, attention, elementwise, recompute, 2 * waited, context, launch)


def _widths(shape: ModelShape, strategy: Strategy) -> tuple[int, int, float]:
    """The rank's features of queries, of keys (or values), and of the average layer's MLP."""
    rank = largest_rank(shape, strategy.tp)
    share = shape.moe_layers / shape.layers
    shard = layer_shard(shape, strategy.tp, rank, share == 1)
    visited = (shape.top_k * shape.expert_ffn + shape.shared_ffn) / strategy.tp
    features = (1 - share) * shard.ffn + share * visited
    return shard.query_heads * shape.head_dim, shard.kv_heads * shape.head_dim, features


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


def _ring_seconds(strategy: Strategy, tokens: float, cluster: Cluster, kv: int) -> float:
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
