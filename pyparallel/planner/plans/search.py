"""Every candidate for answering, with its memory and its speed, the best one first.

The order embodies a recipe, then time:

1. what fits before what does not;
2. without cp before with cp, and both before tp across nodes: what is put aside counts where nothing
   before it fits;
3. the least time for the batch. Two that differ by less than 2 % are as good: of them the one with fewer
   context ranks, then fewer stages, then more tokens a second when there are always more requests.

So tp is the default, for it is what makes one sequence faster; pp comes in when tp inside a node does
not hold the model (or when its reductions cost more than stages do, as on PCIe); cp when a prompt does
not fit; dp when there are more sequences than tp makes use of.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from pyparallel.planner.engine_rates import EngineRates
from pyparallel.planner.hardware import Cluster
from pyparallel.planner.memory import RankMemory, limit_bytes, peak
from pyparallel.planner.memory_inference import inference_memory
from pyparallel.planner.plans.candidates import meshes
from pyparallel.planner.serving import MAX_SEQUENCES, Speed, answer_batch, serve_all
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import Inference, Strategy

# Why the recipe puts a candidate aside.
CP_WITHOUT_NEED = "cp without need"
TP_ACROSS_NODES = "tp across nodes"
# Numbers of stages that fit and are tried, of the same tp and cp: more only add messages.
MOST_STAGES_TRIED = 3
# Times that differ by less are not told apart.
TIE = 0.02


@dataclass(frozen=True)
class Candidate:
    """One way to answer a batch.

    Attributes:
        replica_batch: sequences of each dp replica at once.
        memory: of each stage's fullest rank, with that batch.
        limit_bytes: what a rank may have.
        speed: of one replica; None where it does not fit.
        max_batch: sequences that one replica has room for, their prompts read one at a time.
        max_tokens_per_s: of all replicas, when there are always more requests.
        apart: why the recipe puts it after others, whatever its time; "" where it does not.
    """

    strategy: Strategy
    replica_batch: int
    batch: int
    memory: tuple[RankMemory, ...]
    limit_bytes: float
    speed: Speed | None
    max_batch: int
    max_tokens_per_s: float
    apart: str

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return self.speed is not None

    @property
    def peak(self) -> RankMemory:
        """The rank that needs the most."""
        return peak(list(self.memory))

    @property
    def tokens_per_s(self) -> float:
        """Of all replicas that have a part of the batch."""
        if self.speed is None:
            return 0.0
        return self.speed.tokens_per_s * self.batch / self.replica_batch


def search(
    shape: ModelShape,
    cluster: Cluster,
    work: Inference,
    engine: EngineRates,
    *,
    nodes_of_tp: int = 2,
) -> list[Candidate]:
    """All candidates for ``work.batch`` sequences over the whole cluster, the best first."""
    found: list[Candidate] = []
    fitting: Counter[tuple[int, int]] = Counter()
    for mesh in meshes(shape, cluster, work.prompt, nodes_of_tp=nodes_of_tp):
        cut = mesh.tp, mesh.cp
        if fitting[cut] < MOST_STAGES_TRIED:
            found.append(evaluate(shape, cluster, mesh, work, engine))
            fitting[cut] += found[-1].fits
    return ranked(found)


def evaluate(
    shape: ModelShape, cluster: Cluster, mesh: Strategy, work: Inference, engine: EngineRates
) -> Candidate:
    """Memory and speed of one mesh; sp is turned on where the prefill fits with it alone."""
    batch = -(-work.batch // mesh.dp)
    replica = replace(work, batch=batch)
    limit = limit_bytes(cluster.gpu)
    strategy = mesh
    memory = inference_memory(shape, strategy, replica)
    if mesh.tp > 1 and peak(memory).total > limit:
        with_sp = replace(mesh, sp=True)
        smaller = inference_memory(shape, with_sp, replica)
        if peak(smaller).total <= limit:
            strategy, memory = with_sp, smaller
    most = max_batch(shape, strategy, work, limit)
    speed, rate = None, 0.0
    if peak(memory).total <= limit:
        speed = answer_batch(shape, cluster, strategy, replica, engine)
        loaded = serve_all(shape, cluster, strategy, replica, engine, kv_tokens=most * work.length)
        rate = mesh.dp * loaded.tokens_per_s
    return Candidate(
        strategy=strategy,
        replica_batch=batch,
        batch=work.batch,
        memory=tuple(memory),
        limit_bytes=limit,
        speed=speed,
        max_batch=most,
        max_tokens_per_s=rate,
        apart=_apart(cluster, mesh),
    )


def max_batch(shape: ModelShape, strategy: Strategy, work: Inference, limit: float) -> int:
    """Sequences whose caches fit beside the weights, one prompt being read; 0: not even one."""
    one, two = (
        inference_memory(shape, strategy, replace(work, batch=batch), chunk=work.prompt)
        for batch in (1, 2)
    )
    most = MAX_SEQUENCES
    for first, second in zip(one, two, strict=True):
        if first.total > limit:
            return 0
        each = second.total - first.total
        if each > 0:
            most = min(most, 1 + int((limit - first.total) / each))
    return most


def _apart(cluster: Cluster, mesh: Strategy) -> str:
    if mesh.tp > cluster.gpus_per_node:
        return TP_ACROSS_NODES
    return CP_WITHOUT_NEED if mesh.cp > 1 else ""


def ranked(candidates: list[Candidate]) -> list[Candidate]:
    """The best first; see the recipe above."""
    fitting = [each for each in candidates if each.fits]
    rest = [each for each in candidates if not each.fits]
    rest.sort(key=lambda each: (each.peak.total, -each.strategy.tp))
    ordered: list[Candidate] = []
    for apart in ("", CP_WITHOUT_NEED, TP_ACROSS_NODES):
        tier = [each for each in fitting if each.apart == apart]
        if not ordered:
            # Nothing before it fits, so there is need.
            tier = [replace(each, apart="") for each in tier]
        tier.sort(key=lambda each: -each.tokens_per_s)
        ordered += _ties_by_simplicity(tier)
    return ordered + rest


def _ties_by_simplicity(tier: list[Candidate]) -> list[Candidate]:
    """Runs of candidates within :data:`TIE` of the run's fastest, the simplest of each first."""
    ordered: list[Candidate] = []
    while tier:
        fastest = tier[0].tokens_per_s
        run = [each for each in tier if each.tokens_per_s >= fastest * (1 - TIE)]
        run.sort(key=lambda each: (each.strategy.cp, each.strategy.pp, -each.max_tokens_per_s))
        ordered += run
        tier = tier[len(run) :]
    return ordered
