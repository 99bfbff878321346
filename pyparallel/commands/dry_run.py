"""``pyparallel plan --dry-run``: the best plan's modules, built without storage, beside the formulas."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from pyparallel.drawing.model import config_of
from pyparallel.models.dry_run import Calls, Counted, dry_run_inference, dry_run_training
from pyparallel.planner.engines import PYPARALLEL
from pyparallel.planner.memory import stage_shards, weight_bytes
from pyparallel.planner.memory_inference import sequence_bytes
from pyparallel.planner.messages import inference_calls, training_calls
from pyparallel.planner.weights import rank_stages

if TYPE_CHECKING:
    from pyparallel.planner.plans.inference import InferencePlan
    from pyparallel.planner.plans.training import TrainingPlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StageCheck:
    """One pp rank: what the formulas say, and what its modules hold and call.

    Attributes:
        weights, cache: (planned, counted) bytes; no cache in training.
        calls: by phase, (planned, counted) collectives over tp.
        other: by phase, what is called over cp and sent over pp, counted.
    """

    stage: int
    layers: int
    weights: tuple[int, int]
    cache: tuple[int, int] | None
    calls: dict[str, tuple[Counter, Counter]]
    other: dict[str, Calls]

    @property
    def agrees(self) -> bool:
        """Whether every number is the same."""
        pairs = [self.weights, *self.calls.values(), *([self.cache] if self.cache else [])]
        return all(planned == counted for planned, counted in pairs)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "stage": self.stage,
            "layers": self.layers,
            "agrees": self.agrees,
            "weight_bytes": _pair(*self.weights),
            "cache_bytes": self.cache and _pair(*self.cache),
            "collectives": {
                phase: {
                    "tp": _pair(*(_listed(side) for side in sides)),
                    **{axis: _listed(calls) for axis, calls in self.other[phase].items()},
                }
                for phase, sides in self.calls.items()
            },
        }


def dry_run(plan: InferencePlan | TrainingPlan, *, train: bool) -> list[StageCheck]:
    """Each pp rank of the plan's best candidate.

    Raises:
        ValueError: a model that has no modules yet (experts), or weights of a type that no module holds.
    """
    shape, best, work = plan.shape, plan.best, plan.work
    strategy = best.strategy
    name = work.dtype if train else work.weight_dtype
    if name not in DTYPES:
        raise ValueError(f"--dry-run: expected --dtype {', '.join(DTYPES)}, got {name}")
    stages = strategy.pp * strategy.virtual_stages
    options = {"tp": strategy.tp, "pp": stages, "cp": strategy.cp, "dtype": DTYPES[name]}
    config = config_of(shape)
    if train:
        counted = dry_run_training(
            config,
            micro_batch=strategy.micro_batch,
            sequence=work.sequence,
            sequence_parallel=strategy.sp and strategy.tp > 1,
            recompute=strategy.recompute,
            **options,
        )
        batch = strategy.micro_batch
    else:
        batch = best.replica_batch
        counted = dry_run_inference(
            config, batch=batch, prompt=work.prompt, output=work.output, **options
        )
    found = []
    shards = stage_shards(shape, strategy, PYPARALLEL)
    for place, shard in enumerate(shards):
        held = [
            counted[stage] for stage in rank_stages(strategy.pp, place, strategy.virtual_stages)
        ]
        planned_calls: dict[str, Counter] = {}
        for each in held:
            count, ends = len(each.stage.layers), {"first": each.stage.is_first}
            if train:
                ends["last"] = each.stage.is_last
                told = training_calls(shape, strategy, work, count, **ends)
            else:
                told = inference_calls(shape, strategy, replace(work, batch=batch), count, **ends)
            for phase, calls in told.items():
                planned_calls[phase] = planned_calls.get(phase, Counter()) + calls
        cache = None
        if not train:
            of_one = sequence_bytes(shape, strategy, work, shard, PYPARALLEL)
            cache = round(batch * of_one), sum(each.cache_bytes for each in held)
        found.append(
            StageCheck(
                stage=place,
                layers=sum(len(each.stage.layers) for each in held),
                weights=(round(weight_bytes(shard, name)), _weights(held)),
                cache=cache,
                calls={
                    phase: (calls, _over(held, phase, ("tp",)).get("tp", Counter()))
                    for phase, calls in planned_calls.items()
                },
                other={phase: _over(held, phase, ("cp", "pp")) for phase in planned_calls},
            )
        )
    return found


def _weights(held: list[Counted]) -> int:
    return sum(each.weight_bytes for each in held)


def _over(held: list[Counted], phase: str, axes: tuple[str, ...]) -> Calls:
    sums: Calls = {}
    for each in held:
        for axis in axes:
            if calls := each.calls[phase].get(axis):
                sums[axis] = sums.get(axis, Counter()) + calls
    return sums


def _pair(planned: Any, counted: Any) -> dict[str, Any]:
    return {"planned": planned, "counted": counted}


def _listed(calls: Counter) -> list[dict[str, Any]]:
    return [
        {"operation": operation, "bytes": size, "calls": count}
        for (operation, size), count in sorted(calls.items())
    ]
