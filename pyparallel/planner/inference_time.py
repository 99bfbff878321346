"""How long one pass of tokens through the model takes: a roofline per operation, stage by stage.

A pass is a prefill (many tokens of each sequence) or a decode step (one token of each). For each stage::

    matmuls        max(weight bytes / (memory rate), flops / (matmul rate)), the head apart attention
    max(KV bytes / (memory rate), flops / (matmul rate of bf16)) communication  two reductions a layer
    over tp, messages or a ring over cp, one message to the next stage overhead       seconds a layer,
    a pass, and (decode) a sequence

The rates are the GPU's times the engine's fractions (:mod:`pyparallel.planner.engine_rates`). Experts: a
pass of T tokens reads E (1 - (1 - k/E)^T) of E experts, where each token visits k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from pyparallel.planner.communication import Kernel, collective_seconds
from pyparallel.planner.engine_rates import Constants
from pyparallel.planner.engines import PYPARALLEL
from pyparallel.planner.hardware import Cluster
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import BYTES, Inference, Strategy
from pyparallel.planner.weights import kept_weights, largest_rank, layer_shard, stage_layers

# Weights of these types are multiplied in their own; others are widened to bf16 first.
MULTIPLIED = ("fp8", "fp4")


def activation_bytes(work: Inference) -> int:
    """Of one number between the matmuls, and of the head and the embedding, which stay unquantized."""
    return 4 if work.weight_dtype == "fp32" else 2


@dataclass(frozen=True)
class StageWork:
    """What one stage does in a pass, in seconds at the full rates of its GPU.

    Attributes:
        read, compute: of the layers' matrices.
        head_read, head_compute: of the LM head; 0 on other stages than the last.
        kv_read, attend: of attention.
        communication: reductions over tp and exchanges over cp, as measured or by alpha and beta.
        send: the message to the next stage.
        layers, sequences: that overheads are counted for; ``sequences`` is 0 in a prefill.
    """

    read: float
    compute: float
    head_read: float
    head_compute: float
    kv_read: float
    attend: float
    communication: float
    send: float
    layers: int
    sequences: float


@dataclass(frozen=True)
class Terms:
    """Seconds by what they are spent on."""

    matmuls: float = 0.0
    attention: float = 0.0
    communication: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.matmuls + self.attention + self.communication + self.overhead

    def plus(self, other: Terms, times: float = 1.0) -> Terms:
        """This and ``times`` another."""
        return Terms(
            self.matmuls + times * other.matmuls,
            self.attention + times * other.attention,
            self.communication + times * other.communication,
            self.overhead + times * other.overhead,
        )


def stage_terms(work: StageWork, constants: Constants) -> Terms:
    """Seconds of one stage's pass by an engine of these constants."""
    memory, flops = constants.memory_fraction, constants.flops_fraction
    head = max(work.head_read / memory, work.head_compute / flops)
    return Terms(
        matmuls=max(work.read / memory, work.compute / flops) + head,
        attention=max(work.kv_read / memory, work.attend / flops),
        communication=work.communication + work.send,
        overhead=work.layers * constants.layer_s
        + constants.step_s
        + work.sequences * constants.sequence_s,
    )


def pass_terms(works: Sequence[StageWork], constants: Constants) -> tuple[Terms, Terms]:
    """Of a whole pass, one stage after the other, and of its slowest stage."""
    if len(works) > 1 and constants.staged_layer_s is not None:
        constants = replace(constants, layer_s=constants.staged_layer_s)
    whole, slowest = Terms(), Terms()
    for work in works:
        terms = stage_terms(work, constants)
        whole = whole.plus(terms)
        slowest = max(slowest, terms, key=lambda each: each.total)
    return whole, slowest


@lru_cache(maxsize=1 << 14)
def pass_works(
    shape: ModelShape,
    cluster: Cluster,
    strategy: Strategy,
    work: Inference,
    *,
    sequences: float,
    tokens: int,
    context: float,
    kernel: Kernel,
) -> tuple[StageWork, ...]:
    """The work of each stage, where ``sequences`` of a replica each read ``tokens`` more.

    Args:
        context: tokens that a sequence has before them.
        kernel: whose all_reduce a decode step (``tokens`` 1) calls; a prefill calls NCCL's.
    """
    gpu, tp, cp = cluster.gpu, strategy.tp, strategy.cp
    decodes = tokens == 1
    # A prompt is cut over cp; a single token is on all of its ranks.
    rows = sequences * tokens / (1 if decodes else cp)
    weight_bytes = BYTES[work.weight_dtype]
    dtype = work.weight_dtype if work.weight_dtype in MULTIPLIED else "bf16"
    rate, plain_rate = gpu.best_flops(dtype), gpu.best_flops("bf16")
    shard = layer_shard(shape, tp, largest_rank(shape, tp))
    # A token attends to what is before it and, in its own pass, to half of what is with it.
    pairs = sequences * tokens * (context + (tokens / 2 if not decodes else 1)) / cp
    attend = 4 * pairs * shard.query_heads * shape.head_dim / plain_rate
    kv_bytes = 2 * shard.kv_heads * shape.head_dim * BYTES[work.kv_dtype]
    kv_read = sequences * (context + tokens) / cp * kv_bytes / gpu.bandwidth
    kernel = kernel if decodes else "nccl"
    wide = activation_bytes(work)
    residual = rows * shape.hidden * wide
    exchanged = _layer_communication(
        shape, cluster, strategy, rows, residual, decodes, kernel, kv_bytes
    )
    layers = stage_layers(shape, strategy.pp, PYPARALLEL.balance)
    found = []
    for index, stage in enumerate(layers):
        experts = sum(shape.is_moe(layer) for layer in stage)
        read, multiplied = 0.0, 0.0
        for count, moe in ((len(stage) - experts, False), (experts, True)):
            if count:
                touched, met = _layer_weights(shape, tp, moe, rows)
                read += count * touched * weight_bytes
                multiplied += count * met
        # What a quantized checkpoint keeps is read and multiplied at 16 bits.
        kept = kept_weights(shape, tp, largest_rank(shape, tp), stage)
        read += kept * (max(weight_bytes, 2.0) - weight_bytes)
        multiplied -= kept
        last, first = index == len(layers) - 1, index == 0
        head = -(-shape.vocab // tp) * shape.hidden if last else 0
        # Only the last token of a prompt is given logits.
        head_rows = sequences
        message = residual / (tp if strategy.sp else 1)
        embedding = _reduction(cluster, strategy, residual, kernel) if first else 0.0
        found.append(
            StageWork(
                read=read / gpu.bandwidth,
                compute=2 * rows * (multiplied / rate + kept / plain_rate),
                head_read=head * wide / gpu.bandwidth,
                head_compute=2 * head_rows * head / plain_rate,
                kv_read=len(stage) * kv_read,
                attend=len(stage) * attend,
                communication=len(stage) * exchanged + embedding,
                send=0.0 if last else _send(cluster, strategy, message),
                layers=len(stage),
                sequences=sequences if decodes else 0.0,
            )
        )
    return tuple(found)


def _layer_weights(shape: ModelShape, tp: int, moe: bool, rows: float) -> tuple[float, float]:
    """Weights of one layer that the busiest rank reads, and that each of its tokens meets."""
    shard = layer_shard(shape, tp, largest_rank(shape, tp), moe)
    if not moe:
        return shard.attention + shard.mlp, shard.attention + shard.mlp
    shared = shape.mlp_matrices * shape.hidden * -(-shape.shared_ffn // tp)
    each = (shard.mlp - shared) / shape.experts
    missed = (1 - shape.top_k / shape.experts) ** rows
    touched = each * shape.experts * (1 - missed)
    return shard.attention + shared + touched, shard.attention + shared + each * shape.top_k


def _reduction(cluster: Cluster, strategy: Strategy, num_bytes: float, kernel: Kernel) -> float:
    """One reduction of the residual stream over tp; with sp its two halves move the same bytes."""
    return collective_seconds("all_reduce", num_bytes, strategy.tp, cluster, kernel=kernel)


def _layer_communication(
    shape: ModelShape,
    cluster: Cluster,
    strategy: Strategy,
    rows: float,
    residual: float,
    decodes: bool,
    kernel: Kernel,
    kv_bytes: float,
) -> float:
    """Two reductions over tp; over cp the others' keys and values, or the parts of one answer."""
    total = 2 * _reduction(cluster, strategy, residual, kernel)
    if strategy.cp == 1:
        return total
    apart = max(1, min(strategy.cp, cluster.gpus_per_node // strategy.tp))
    if decodes:
        # Each rank's output in fp32, and its logarithm of a sum.
        heads = -(-shape.heads // strategy.tp)
        num_bytes = rows * heads * (shape.head_dim + 1) * 4 * strategy.cp
    else:
        num_bytes = rows * kv_bytes * strategy.cp
    return total + collective_seconds(
        "all_gather", num_bytes, strategy.cp, cluster, ranks_per_node=apart
    )


def _send(cluster: Cluster, strategy: Strategy, num_bytes: float) -> float:
    """The message to the next stage, whose rank is cp x tp further on."""
    inside = cluster.gpus_per_node > strategy.cp * strategy.tp
    return collective_seconds("send", num_bytes, 2, cluster, ranks_per_node=2 if inside else 1)
