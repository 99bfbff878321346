"""How to train a model on a cluster: the plan, its rivals, and the reasons."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pyparallel.planner.hardware import Cluster, with_gpus
from pyparallel.planner.plans.explanation import compared, cuts, gib, memory_dict, memory_reason
from pyparallel.planner.plans.smallest import smallest_cluster
from pyparallel.planner.plans.training_search import (
    TrainingCandidate,
    most_saving,
    training_search,
)
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import Strategy, Training

ZERO = {0: "", 1: "ZeRO 1", 2: "ZeRO 2", 3: "FSDP"}
RECOMPUTE = {"none": "", "attention": "attention recomputed", "layers": "layers recomputed"}


@dataclass(frozen=True)
class TrainingPlan:
    """An answer; fields as :class:`pyparallel.planner.plans.inference.InferencePlan`."""

    HEAD: ClassVar[tuple[str, ...]] = ("plan", "a rank", "a step", "MFU", "tokens/s", "")

    shape: ModelShape
    cluster: Cluster
    work: Training
    candidates: list[TrainingCandidate]
    why: list[str]
    next_best: str
    changes: list[str]

    @property
    def best(self) -> TrainingCandidate:
        """The plan."""
        return self.candidates[0]

    @property
    def best_named(self) -> str:
        """Its cuts and its schedule, for people."""
        return named(self.best.strategy)

    @property
    def asked(self) -> str:
        """The work, for people."""
        work = self.work
        return f"trained in {work.dtype} by {work.global_batch} x {work.sequence} tokens a step"

    @property
    def notes(self) -> list[str]:
        """What the numbers rest on."""
        return ["MFU: of the dense peak; recomputation is not counted, attention as if not causal"]

    def row(self, candidate: TrainingCandidate) -> tuple[str, ...]:
        """A candidate as cells under :attr:`HEAD`."""
        step, memory = candidate.step, gib(candidate.peak.total)
        if step is None:
            return named(candidate.strategy), memory, *("-",) * 3, "does not fit"
        return (
            named(candidate.strategy),
            memory,
            f"{step.total:.3g} s",
            f"{100 * step.mfu:.1f} %",
            f"{step.tokens_per_s:.4g}",
            "",
        )

    def reason(self, candidate: TrainingCandidate) -> str:
        """Why a candidate fits or not, and what it costs."""
        return training_reason(candidate, self.best)

    def times(self) -> dict[str, dict[str, float]]:
        """Seconds of the best by term."""
        assert self.best.step is not None
        return {"a step": dict(self.best.step.terms)}

    def as_dict(self) -> dict[str, Any]:
        """What ``pyparallel plan --train --json`` prints."""
        return {
            "model": self.shape.name,
            "gpu": self.cluster.gpu.name,
            "gpus": self.cluster.gpus,
            "gpus_per_node": self.cluster.gpus_per_node,
            "batch": self.work.global_batch,
            "sequence": self.work.sequence,
            "dtype": self.work.dtype,
            "best": self._candidate_dict(self.best),
            "candidates": [self._candidate_dict(each) for each in self.candidates],
            "why": self.why,
            "next_best": self.next_best,
            "changes": self.changes,
            "notes": self.notes,
        }

    def _candidate_dict(self, candidate: TrainingCandidate) -> dict[str, Any]:
        """Times are null where it does not fit."""
        strategy, step = candidate.strategy, candidate.step
        return {
            **{name: getattr(strategy, name) for name in ("dp", "pp", "cp", "tp", "sp")},
            **{
                name: getattr(strategy, name)
                for name in ("micro_batch", "virtual_stages", "zero", "recompute")
            },
            "memory_bytes": round(candidate.peak.total),
            "memory": [memory_dict(each) for each in candidate.memory],
            "fits": candidate.fits,
            "step_s": step and step.total,
            "mfu": step and step.mfu,
            "tokens_per_s": step and step.tokens_per_s,
            "time": step and dict(step.terms),
            "why": self.reason(candidate),
        }


def named(strategy: Strategy) -> str:
    """The cuts and the schedule: "tp 8 x pp 2 x dp 4 + sp, ZeRO 1, micro-batch 1, 4 stages a rank"."""
    parts = [cuts(strategy), ZERO[strategy.zero], f"micro-batch {strategy.micro_batch}"]
    if strategy.virtual_stages > 1:
        parts.append(f"{strategy.virtual_stages} stages a rank")
    parts.append(RECOMPUTE[strategy.recompute])
    return ", ".join(part for part in parts if part)


def training_reason(candidate: TrainingCandidate, best: TrainingCandidate) -> str:
    """One line: memory, and what the step is spent on or why it is put aside."""
    said = memory_reason(candidate.peak, candidate.limit_bytes, candidate.strategy.pp)
    if candidate.step is None:
        return said
    said += f"; {candidate.step.total:.3g} s a step, MFU {100 * candidate.step.mfu:.0f} %, "
    said += _lost(candidate)
    if candidate is not best:
        said += f"; {compared(best.tokens_per_s / candidate.tokens_per_s)} the best"
    return said


def _lost(candidate: TrainingCandidate) -> str:
    """The largest term that computes nothing new."""
    assert candidate.step is not None
    terms = {
        name: seconds
        for name, seconds in candidate.step.terms.items()
        if name not in ("matmuls", "attention")
    }
    name = max(terms, key=lambda each: terms[each])
    return f"{100 * terms[name] / candidate.step.total:.0f} % lost to {name}"


def plan_training(shape: ModelShape, cluster: Cluster, work: Training) -> TrainingPlan:
    """Which dp x pp x cp x tp, schedule and savings train the fastest, and why.

    Raises:
        ValueError: no mesh holds it, or none divides the batch.
    """
    candidates = training_search(shape, cluster, work)
    if not candidates:
        raise ValueError(
            f"batch: expected a multiple of the replicas that {cluster.gpus} GPUs make, "
            f"got {work.global_batch}"
        )
    if not candidates[0].fits:
        raise ValueError(_impossible(shape, cluster, work, candidates[0]))
    return TrainingPlan(
        shape,
        cluster,
        work,
        candidates,
        _why(candidates),
        _next_best(candidates),
        _changes(shape, cluster, work, candidates[0]),
    )


def _impossible(
    shape: ModelShape, cluster: Cluster, work: Training, closest: TrainingCandidate
) -> str:
    reason = memory_reason(closest.peak, closest.limit_bytes, closest.strategy.pp)
    said = (
        f"{shape.name} trained in {work.dtype} on {cluster.gpus} {cluster.gpu.name}: the closest plan, "
        f"{named(closest.strategy)}, {reason}"
    )

    def holds(grown: Cluster) -> bool:
        # The batch grows with the replicas: memory does not depend on how many micro-batches follow.
        larger = replace(work, global_batch=work.global_batch * grown.gpus)
        return most_saving(shape, grown, larger) is not None

    enough = smallest_cluster(cluster, holds)
    if enough is None:
        return f"{said}; no cluster of these holds it"
    return f"{said}; the smallest cluster that holds it has {enough.gpus}"


def _why(candidates: list[TrainingCandidate]) -> list[str]:
    """A sentence for each choice of the best, by what the fastest without it would take or need."""
    best = candidates[0]
    strategy, said = best.strategy, []
    for axis in ("tp", "pp", "cp", "dp"):
        size = getattr(strategy, axis)
        others = [each for each in candidates if getattr(each.strategy, axis) < size]
        if size > 1 and others:
            # What fits stands first.
            other = others[0]
            cost = (
                f"{compared(best.tokens_per_s / other.tokens_per_s)} this"
                if other.fits
                else memory_reason(other.peak, other.limit_bytes, other.strategy.pp)
            )
            said.append(f"{axis} {size}: with less, {cuts(other.strategy)}, {cost}")
    if strategy.zero == 3:
        said.append(
            "FSDP: weights, gradients and optimizer states do not fit unless dp shares them out"
        )
    if strategy.recompute != "none":
        said.append(f"{RECOMPUTE[strategy.recompute]}: activations do not fit otherwise")
    if best.step is not None:
        memory = memory_reason(best.peak, best.limit_bytes, strategy.pp)
        said.append(f"binding: {_lost(best)}; {memory}, most of it {best.peak.largest}")
    return said


def _next_best(candidates: list[TrainingCandidate]) -> str:
    best, others = candidates[0], [each for each in candidates[1:] if each.fits]
    if not others:
        return "no other plan fits"
    second = others[0]
    return f"{named(second.strategy)}: {compared(best.tokens_per_s / second.tokens_per_s)} the best"


def _changes(
    shape: ModelShape, cluster: Cluster, work: Training, best: TrainingCandidate
) -> list[str]:
    """Other questions near this one whose best plan is another."""
    asked = [(f"a batch of {4 * work.global_batch}", cluster, 4 * work.global_batch)]
    if cluster.gpus > 1:
        half = cluster.gpus // 2
        asked.append((f"{half} GPUs", with_gpus(cluster, half, cluster.gpus_per_node), 0))
    said = []
    for name, place, batch in asked:
        other = replace(work, global_batch=batch or work.global_batch)
        found = training_search(shape, place, other)
        if not found or not found[0].fits:
            reason = (
                memory_reason(found[0].peak, found[0].limit_bytes, found[0].strategy.pp)
                if found
                else "no mesh divides the batch"
            )
            said.append(f"{name}: {reason}")
        elif _shape_of(found[0].strategy) != _shape_of(best.strategy):
            said.append(f"{name}: {named(found[0].strategy)}")
    return said or ["neither " + " nor ".join(name for name, _, _ in asked)]


def _shape_of(strategy: Strategy) -> tuple[object, ...]:
    return strategy.tp, strategy.pp, strategy.cp, strategy.zero, strategy.recompute
