"""How to answer prompts with a model on a cluster: the plan, its rivals, and the reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pyparallel.planner.engine_rates import EngineRates
from pyparallel.planner.hardware import Cluster
from pyparallel.planner.plans.explanation import (
    candidate_reason,
    cuts,
    gib,
    memory_dict,
    memory_reason,
    next_best,
    what_would_change,
    why_best,
)
from pyparallel.planner.plans.search import Candidate, search
from pyparallel.planner.plans.smallest import smallest_cluster
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import Inference


@dataclass(frozen=True)
class InferencePlan:
    """An answer.

    Attributes:
        rates: the measured engine that the speeds rest on.
        candidates: the best first; those that do not fit last.
        why: sentences about the best.
        next_best: the second plan, and what it costs.
        changes: other questions near this one whose answer is another.
    """

    HEAD: ClassVar[tuple[str, ...]] = (
        *("plan", "a rank", "first token", "a token", "tokens/s", "most at once"),
        *("tokens/s then", ""),
    )

    shape: ModelShape
    cluster: Cluster
    work: Inference
    rates: EngineRates
    candidates: list[Candidate]
    why: list[str]
    next_best: str
    changes: list[str]

    @property
    def best(self) -> Candidate:
        """The plan."""
        return self.candidates[0]

    @property
    def best_named(self) -> str:
        """Its cuts, for people."""
        return cuts(self.best.strategy)

    @property
    def asked(self) -> str:
        """The work, for people."""
        work = self.work
        return f"{work.weight_dtype}, {work.batch} x ({work.prompt} + {work.output}) tokens"

    @property
    def notes(self) -> list[str]:
        """What the numbers rest on."""
        name, gpu, file = self.rates.name, self.cluster.gpu.name, self.rates.calibrated_on
        if file:
            return [f"times: {name} on {gpu}, fitted to {file}"]
        return [f"times: {name}, not measured on {gpu}: the constants of all GPUs that were"]

    def row(self, candidate: Candidate) -> tuple[str, ...]:
        """A candidate as cells under :attr:`HEAD`."""
        speed, memory = candidate.speed, gib(candidate.peak.total)
        if speed is None:
            return cuts(candidate.strategy), memory, *("-",) * 5, "does not fit"
        return (
            cuts(candidate.strategy),
            memory,
            f"{speed.ttft_s:.3g} s",
            f"{1e3 * speed.tpot_s:.3g} ms",
            f"{candidate.tokens_per_s:.4g}",
            str(candidate.max_batch * candidate.strategy.dp),
            f"{candidate.max_tokens_per_s:.4g}",
            candidate.apart,
        )

    def reason(self, candidate: Candidate) -> str:
        """Why a candidate fits or not, and what it costs."""
        return candidate_reason(candidate, self.best)

    def times(self) -> dict[str, dict[str, float]]:
        """Seconds of the best by term, of its prefill and of a token."""
        speed = self.best.speed
        assert speed is not None
        return {"prefill": vars(speed.prefill), "a token": vars(speed.step)}

    def as_dict(self) -> dict[str, Any]:
        """What ``pyparallel plan --json`` prints."""
        return {
            "model": self.shape.name,
            "gpu": self.cluster.gpu.name,
            "gpus": self.cluster.gpus,
            "gpus_per_node": self.cluster.gpus_per_node,
            "batch": self.work.batch,
            "prompt": self.work.prompt,
            "output": self.work.output,
            "dtype": self.work.weight_dtype,
            "kv_dtype": self.work.kv_dtype,
            "best": self._candidate_dict(self.best),
            "candidates": [self._candidate_dict(each) for each in self.candidates],
            "why": self.why,
            "next_best": self.next_best,
            "changes": self.changes,
            "notes": self.notes,
        }

    def _candidate_dict(self, candidate: Candidate) -> dict[str, Any]:
        """Speeds are null where it does not fit."""
        strategy, speed = candidate.strategy, candidate.speed
        return {
            **{name: getattr(strategy, name) for name in ("dp", "pp", "cp", "tp", "sp")},
            "memory_bytes": round(candidate.peak.total),
            "memory": [memory_dict(each) for each in candidate.memory],
            "fits": candidate.fits,
            "ttft_s": speed and speed.ttft_s,
            "tpot_s": speed and speed.tpot_s,
            "tokens_per_s": speed and candidate.tokens_per_s,
            "max_batch": candidate.max_batch * strategy.dp,
            "max_tokens_per_s": speed and candidate.max_tokens_per_s,
            "time": speed and dict(vars(speed.step)),
            "why": self.reason(candidate),
        }


def plan_inference(
    shape: ModelShape, cluster: Cluster, work: Inference, rates: EngineRates
) -> InferencePlan:
    """Which dp x pp x cp x tp answers a batch the fastest, and why.

    Raises:
        ValueError: nothing fits; the message says what would.
    """
    candidates = search(shape, cluster, work, rates)
    if not candidates[0].fits:
        raise ValueError(_impossible(shape, cluster, work, candidates[0], rates))
    return InferencePlan(
        shape=shape,
        cluster=cluster,
        work=work,
        rates=rates,
        candidates=candidates,
        why=why_best(shape, cluster, candidates),
        next_best=next_best(candidates),
        changes=what_would_change(shape, cluster, work, rates, candidates[0]),
    )


def _impossible(
    shape: ModelShape, cluster: Cluster, work: Inference, closest: Candidate, rates: EngineRates
) -> str:
    reason = memory_reason(closest.peak, closest.limit_bytes, closest.strategy.pp)
    said = (
        f"{shape.name} in {work.weight_dtype}, {work.batch} x ({work.prompt} + {work.output}) tokens, "
        f"on {cluster.gpus} {cluster.gpu.name}: the closest plan, {cuts(closest.strategy)}, {reason}"
    )
    best: list[Candidate] = []

    def holds(grown: Cluster) -> bool:
        best[:] = search(shape, grown, work, rates)[:1]
        return bool(best) and best[0].fits

    enough = smallest_cluster(cluster, holds)
    if enough is None:
        return f"{said}; no cluster of these holds it"
    return (
        f"{said}; the smallest cluster that holds it has {enough.gpus} ({cuts(best[0].strategy)})"
    )
