"""Bytes of one rank, by what they are for, and whether they fit.

:mod:`pyparallel.planner.memory_inference` and :mod:`pyparallel.planner.memory_training` fill the terms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from pyparallel.planner.engines import Engine
from pyparallel.planner.hardware import Gpu
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import BYTES, Strategy
from pyparallel.planner.weights import (
    StageShard,
    largest_rank,
    rank_stages,
    stage_layers,
    stage_shard,
)

# Of what the driver reports, torch can't have about this: H100 reports 79.65 GiB, torch sees 79.22
# (vLLM's log in memory_oom_points.json).
DRIVER_SHARE = 0.0054
# Room that an allocator and a context need and no formula counts: of the 1728 runs of
# train_ultrascale_h100_sweep.json none peaked above 77.4 of 79.2 GiB, contexts not counted.
HEADROOM = 0.04


@dataclass(frozen=True)
class RankMemory:
    """The bytes of the tp rank that holds the most of one pp rank.

    Attributes:
        stage: the pp rank.
        terms: bytes by name, in the order in which they are shown: "weights", "kv cache",
            "gradients", "optimizer", "activations", "logits", "buffers", "overhead".
    """

    stage: int
    terms: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.terms.values())

    @property
    def largest(self) -> str:
        """The name of the largest term."""
        return max(self.terms, key=lambda name: self.terms[name])


def usable_bytes(gpu: Gpu) -> float:
    """What a process can have of its GPU, its context included."""
    return gpu.memory_bytes * (1 - DRIVER_SHARE)


def limit_bytes(gpu: Gpu) -> float:
    """What a plan may ask of a GPU: :data:`HEADROOM` less than a process can have."""
    return usable_bytes(gpu) * (1 - HEADROOM)


def peak(memory: list[RankMemory]) -> RankMemory:
    """The rank that needs the most."""
    return max(memory, key=lambda each: each.total)


def fits(memory: list[RankMemory], gpu: Gpu) -> bool:
    """Whether every rank has room."""
    return peak(memory).total <= limit_bytes(gpu)


def stage_shards(shape: ModelShape, strategy: Strategy, engine: Engine) -> tuple[StageShard, ...]:
    """For each pp rank, what its largest tp rank holds.

    Raises:
        ValueError: more stages than layers, or more tp ranks than heads.
    """
    cut = strategy.tp, strategy.pp, strategy.virtual_stages
    return _stage_shards(shape, *cut, engine.balance)


# A search asks for the same cuts with every micro-batch, ZeRO and recomputation.
@lru_cache(maxsize=1024)
def _stage_shards(
    shape: ModelShape, tp: int, pp: int, virtual_stages: int, balance: str
) -> tuple[StageShard, ...]:
    layers = stage_layers(shape, pp * virtual_stages, balance)
    rank = largest_rank(shape, tp)
    return tuple(
        stage_shard(shape, tp, rank, rank_stages(pp, place, virtual_stages), layers)
        for place in range(pp)
    )


def weight_bytes(shard: StageShard, dtype: str) -> float:
    """Bytes of a stage's weights; of a type below 16 bits, embeddings, heads and what the checkpoint
    keeps stay bf16."""
    table = max(BYTES[dtype], 2.0)
    layers = (shard.layer_total - shard.kept) * BYTES[dtype] + shard.kept * table
    return layers + (shard.embedding + shard.head + shard.final_norm) * table


def overhead_bytes(strategy: Strategy, engine: Engine) -> float:
    """A process's own memory and the buffers of its groups."""
    groups = sum(size > 1 for size in (strategy.dp, strategy.pp, strategy.cp, strategy.tp))
    return engine.context_bytes + groups * engine.group_bytes
