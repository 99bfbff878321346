"""Seconds of a training step, by what they are spent on.

A pipeline of p ranks with m micro-batches and v stages a rank (1F1B; interleaved above one):

    t = m max_r t_r + (sum_r t_r - max_r t_r) / v + exposed dp + optimizer

t_r: forward and backward of one micro-batch on rank r, with what is computed again and with the
communication of tp, cp and pp that is not hidden. The second term is the bubble, (p - 1) / v of a
micro-batch where ranks are equal (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

Model FLOPs count no recomputation, and attention as if it were not causal:
6 T W + 12 T L N D S for T tokens, W weights that a token is multiplied with (the head's among them) and
S tokens a sequence; MFU is of the dense peak. Others count otherwise: SC'21's table counts what is
computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyparallel.planner.engines import PYPARALLEL, Engine
from pyparallel.planner.hardware import Cluster
from pyparallel.planner.layer_time import LayerTime, head_seconds, layer_time
from pyparallel.planner.memory import stage_shards
from pyparallel.planner.roofline import Rates, moved_seconds, rates_of
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import OPTIMIZERS, Strategy, Training
from pyparallel.planner.training_messages import data_seconds, stage_message_seconds
from pyparallel.planner.weights import StageShard


@dataclass(frozen=True)
class StepTime:
    """A step, in seconds, by what it is spent on.

    Attributes:
        terms: "matmuls", "attention", "elementwise", "recompute", "tensor parallel", "context parallel",
            "launches", "pipeline messages", "bubble", "data parallel", "optimizer".
        mfu: model FLOPs over the peak, as this module's docstring counts them.
    """

    terms: dict[str, float]
    tokens_per_s: float
    mfu: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.terms.values())


def model_flops(shape: ModelShape, training: Training) -> float:
    """Of one step; see above for what is counted."""
    attention = 12 * shape.layers * shape.heads * shape.head_dim * training.sequence
    return training.tokens * (6 * shape.matmul_weights() + attention)


def training_time(
    shape: ModelShape,
    strategy: Strategy,
    training: Training,
    cluster: Cluster,
    *,
    engine: Engine = PYPARALLEL,
    rates: Rates | None = None,
) -> StepTime:
    """A step of ``strategy`` on ``cluster``.

    Args:
        rates: by default those of the cluster's GPU.

    Raises:
        ValueError: a batch that does not divide, more stages than layers, more tp ranks than heads.
    """
    rates = rates or rates_of(cluster.gpu.name)
    micro_batches = training.micro_batches(strategy)
    layer = layer_time(shape, strategy, training, cluster, engine, rates)
    shards = stage_shards(shape, strategy, engine)
    message = stage_message_seconds(shape, strategy, training, cluster)
    ranks = [
        _rank_terms(shape, strategy, training, cluster, rates, layer, shard, message)
        for shard in shards
    ]
    slowest = max(ranks, key=lambda terms: sum(terms.values()))
    together = sum(sum(terms.values()) for terms in ranks)
    most = sum(slowest.values())
    terms = {name: micro_batches * seconds for name, seconds in slowest.items()}
    terms["bubble"] = (together - most) / strategy.virtual_stages
    terms["data parallel"] = data_seconds(
        shards, strategy, training, cluster, rates, hidden_under=most, micro_batches=micro_batches
    )
    terms["optimizer"] = max(
        optimizer_seconds(shard, strategy, training, cluster, rates) for shard in shards
    )
    seconds = sum(terms.values())
    peak = strategy.ranks * cluster.gpu.peak_flops(training.dtype)
    flops = model_flops(shape, training)
    return StepTime(terms, training.tokens / seconds, flops / seconds / peak)


def _rank_terms(
    shape: ModelShape,
    strategy: Strategy,
    training: Training,
    cluster: Cluster,
    rates: Rates,
    layer: LayerTime,
    shard: StageShard,
    message: float,
) -> dict[str, float]:
    """One micro-batch, forward and backward, on one pp rank."""
    count = shard.layers
    terms = {
        "matmuls": count * layer.matmuls,
        "attention": count * layer.attention,
        "elementwise": count * layer.elementwise,
        "recompute": count * layer.recompute,
        "tensor parallel": count * layer.tensor,
        "context parallel": count * layer.context,
        "launches": count * layer.launch,
        "pipeline messages": message,
    }
    # The embedding's output is reduced forward, the gradient of the head's input backward.
    terms["tensor parallel"] += layer.tensor / 4 * ((shard.embedding > 0) + (shard.vocab > 0))
    if shard.vocab:
        matmul, moved = head_seconds(shape, strategy, training, cluster, rates, shard.vocab)
        terms["matmuls"] += matmul
        terms["elementwise"] += moved
    return terms


def optimizer_seconds(
    shard: StageShard, strategy: Strategy, training: Training, cluster: Cluster, rates: Rates
) -> float:
    """Reading gradients and states and writing states and weights, of this rank's part of them."""
    if training.frozen:
        return 0.0
    states = 4 * OPTIMIZERS[training.optimizer] + 4 * training.master
    parameters = shard.total / (strategy.dp * strategy.cp if strategy.zero else 1)
    # The norm of the gradients is one more reading of them all.
    moved = parameters * (4 + 2 * states + 2) + 4 * shard.total
    return moved_seconds(moved, cluster.gpu, rates)
