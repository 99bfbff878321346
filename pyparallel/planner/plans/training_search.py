"""Every candidate for training, with its memory and the time of its step, the best one first.

On each mesh dp x pp x cp x tp, tp inside a node and with sp, all micro-batches and numbers of stages a
rank are tried, each with the first of these savings that fits, for each costs more time than the one
before: optimizer states over dp (ZeRO 1); weights over dp too (ZeRO 3, FSDP); all but the layers' inputs
computed again, with ZeRO 1 and 3. Flash attention keeps no scores that could be computed again. The
mesh's fastest stands for it. Two that differ by less than 2 % are as good: of them the one with fewer
context ranks, then fewer stages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyparallel.planner.hardware import Cluster
from pyparallel.planner.memory import RankMemory, limit_bytes, peak
from pyparallel.planner.memory_training import training_memory
from pyparallel.planner.plans.candidates import meshes, schedules
from pyparallel.planner.plans.search import TIE
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import Strategy, Training
from pyparallel.planner.training_time import StepTime, training_time

# Zero and recompute, the cheapest first.
SAVINGS = ((1, "none"), (3, "none"), (1, "layers"), (3, "layers"))
# What no recomputation makes smaller.
STATES = ("weights", "gradients", "optimizer")


@dataclass(frozen=True)
class TrainingCandidate:
    """One way to train.

    Attributes:
        memory: of each stage's fullest rank.
        limit_bytes: what a rank may have.
        step: None where it does not fit.
    """

    strategy: Strategy
    memory: tuple[RankMemory, ...]
    limit_bytes: float
    step: StepTime | None

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return self.step is not None

    @property
    def peak(self) -> RankMemory:
        """The rank that needs the most."""
        return peak(list(self.memory))

    @property
    def tokens_per_s(self) -> float:
        """Of all GPUs."""
        return self.step.tokens_per_s if self.step else 0.0


def training_search(
    shape: ModelShape, cluster: Cluster, training: Training
) -> list[TrainingCandidate]:
    """The fastest way of each mesh of the whole cluster, the best first; what does not fit last."""
    found = []
    for mesh in meshes(shape, cluster, training.sequence, nodes_of_tp=1):
        best = best_of_mesh(shape, cluster, training, mesh)
        if best is not None:
            found.append(best)
    fitting = [each for each in found if each.fits]
    fitting.sort(key=lambda each: -each.tokens_per_s)
    ordered: list[TrainingCandidate] = []
    while fitting:
        least = fitting[0].tokens_per_s * (1 - TIE)
        run = [each for each in fitting if each.tokens_per_s >= least]
        fitting = fitting[len(run) :]
        ordered += sorted(run, key=lambda each: (each.strategy.cp, each.strategy.pp))
    rest = sorted((each for each in found if not each.fits), key=lambda each: each.peak.total)
    return ordered + rest


def best_of_mesh(
    shape: ModelShape, cluster: Cluster, training: Training, mesh: Strategy
) -> TrainingCandidate | None:
    """The fastest schedule that fits, or the smallest that does not; None: no batch divides."""
    limit = limit_bytes(cluster.gpu)
    best: TrainingCandidate | None = None
    for micro_batch, virtual, sp in schedules(shape, training, mesh):
        cut = replace(mesh, micro_batch=micro_batch, virtual_stages=virtual, sp=sp)
        hopeless: set[int] = set()
        for zero, recompute in SAVINGS:
            if zero in hopeless:
                continue
            strategy = replace(cut, zero=zero if mesh.dp * mesh.cp > 1 else 0, recompute=recompute)
            memory = tuple(training_memory(shape, strategy, training))
            fits = peak(list(memory)).total <= limit
            step = training_time(shape, strategy, training, cluster) if fits else None
            candidate = TrainingCandidate(strategy, memory, limit, step)
            if best is None or _better(candidate, best):
                best = candidate
            if fits:
                break
            if max(sum(each.terms[name] for name in STATES) for each in memory) > limit:
                hopeless.add(zero)
    return best


def _better(one: TrainingCandidate, other: TrainingCandidate) -> bool:
    if one.fits != other.fits:
        return one.fits
    if one.fits:
        return one.tokens_per_s > other.tokens_per_s
    return one.peak.total < other.peak.total


def most_saving(
    shape: ModelShape, cluster: Cluster, training: Training
) -> TrainingCandidate | None:
    """Some candidate that fits, however slow; None where there is none. Far fewer are tried."""
    limit = limit_bytes(cluster.gpu)
    for mesh in meshes(shape, cluster, training.sequence, nodes_of_tp=1):
        if training.global_batch % mesh.dp:
            continue
        cut = replace(mesh, sp=mesh.tp > 1, recompute="layers")
        strategy = replace(cut, zero=3 if mesh.dp * mesh.cp > 1 else 0)
        memory = tuple(training_memory(shape, strategy, training))
        if peak(list(memory)).total <= limit:
            step = training_time(shape, strategy, training, cluster)
            return TrainingCandidate(strategy, memory, limit, step)
    return None
