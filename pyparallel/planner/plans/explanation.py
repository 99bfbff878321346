"""Why: what overflows, what binds, why the best wins, what the next would cost, what would change it."""

from __future__ import annotations

from dataclasses import replace

from pyparallel.planner.engine_rates import EngineRates
from pyparallel.planner.hardware import Cluster, with_gpus
from pyparallel.planner.inference_time import Terms
from pyparallel.planner.memory import RankMemory
from pyparallel.planner.plans.search import TIE, TP_ACROSS_NODES, Candidate, evaluate, search
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import Inference, Strategy

GIB = 2**30
NAMES = {
    "matmuls": "reading and multiplying weights",
    "attention": "attention and its cache",
    "communication": "communication",
    "overhead": "launches and the host",
}


def cuts(strategy: Strategy) -> str:
    """The axes that are cut: "tp 8 x pp 2"; "one GPU" where none is."""
    axes = (("tp", strategy.tp), ("pp", strategy.pp), ("cp", strategy.cp), ("dp", strategy.dp))
    named = " x ".join(f"{name} {size}" for name, size in axes if size > 1)
    return (named or "one GPU") + (" + sp" if strategy.sp else "")


def overflowing(memory: RankMemory, limit: float) -> str:
    """The first term, in the order in which they are allocated, that has no room any more."""
    held = 0.0
    for name, size in memory.terms.items():
        held += size
        if held > limit:
            return name
    return ""


def gib(num_bytes: float) -> str:
    """For people: 50.7 GiB."""
    return f"{num_bytes / GIB:.1f} GiB"


def memory_dict(memory: RankMemory) -> dict[str, int]:
    """The terms of a rank in whole bytes, and its stage."""
    return {"stage": memory.stage, **{name: round(size) for name, size in memory.terms.items()}}


def memory_reason(memory: RankMemory, limit: float, stages: int) -> str:
    """Whether a rank has room, or which term overflows."""
    place = f" of stage {memory.stage}" if stages > 1 else ""
    if memory.total <= limit:
        return f"fits: {gib(memory.total)} of {gib(limit)} a rank"
    name = overflowing(memory, limit)
    size = memory.terms[name]
    alone = "alone " if size > limit else ""
    # Weights, activations, logits; a cache, an optimizer.
    one = "" if name.endswith("s") else "s"
    return (
        f"does not fit: rank{place} needs {gib(memory.total)} of {gib(limit)}; "
        f"{name} overflow{one} ({alone}take{one} {gib(size)})"
    )


def largest_share(terms: Terms) -> str:
    """What most of the time goes to."""
    parts = {name: getattr(terms, name) for name in NAMES}
    name = max(parts, key=lambda each: parts[each])
    return f"{100 * parts[name] / terms.total:.0f} % of it {NAMES[name]}"


def candidate_reason(candidate: Candidate, best: Candidate | None) -> str:
    """One line: memory, and where the time goes or why it is put aside."""
    said = memory_reason(candidate.peak, candidate.limit_bytes, candidate.strategy.pp)
    if candidate.speed is None:
        return said
    said += (
        f"; {1e3 * candidate.speed.tpot_s:.1f} ms a token, {largest_share(candidate.speed.step)}"
    )
    if candidate.apart == TP_ACROSS_NODES:
        said += (
            "; put aside: its reductions cross nodes, where their time is the least certain number"
        )
    elif candidate.apart:
        said += "; put aside: the prompt fits without cp"
    if best is not None and candidate is not best and best.tokens_per_s:
        said += f"; {compared(best.tokens_per_s / candidate.tokens_per_s)} the best"
    return said


def compared(ratio: float) -> str:
    """Time of one in terms of another's: "1.8x the time of"."""
    if abs(ratio - 1) < 0.01:
        return "as fast as"
    return f"{ratio:.2f}x the time of"


def why_best(shape: ModelShape, cluster: Cluster, candidates: list[Candidate]) -> list[str]:
    """One sentence for each axis of the best candidate, by what the others would need or cost."""
    best = candidates[0]
    strategy, said = best.strategy, []
    link = cluster.intra.name
    if strategy.tp > 1:
        place = f"inside a node of {cluster.gpus_per_node} ({link})"
        said.append(
            f"tp {strategy.tp}: {strategy.tp} GPUs work on each token, and its "
            f"{2 * shape.layers} reductions stay {place}"
        )
    if strategy.pp > 1:
        said.append(f"pp {strategy.pp}: {_why_not_fewer_stages(cluster, candidates)}")
    if strategy.cp > 1:
        without = _like(candidates, strategy, cp=1)
        reason = memory_reason(without.peak, without.limit_bytes, 1) if without else "long prompts"
        said.append(f"cp {strategy.cp}: without it, {reason}")
    if strategy.sp:
        said.append("sp: activations of the prefill fit only as shards of the tokens")
    if strategy.dp > 1:
        busy = min(strategy.dp, best.batch)
        rest = f"; a batch of {best.batch} keeps {busy} busy" if busy < strategy.dp else ""
        said.append(f"dp {strategy.dp}: replicas answer different requests{rest}")
    if best.speed is not None:
        where = largest_share(best.speed.step)
        said.append(f"binding: {1e3 * best.speed.tpot_s:.1f} ms a token, {where}")
    return said


def _why_not_fewer_stages(cluster: Cluster, candidates: list[Candidate]) -> str:
    best = candidates[0]
    fewer = [
        each
        for each in candidates
        if each.strategy.pp < best.strategy.pp and each.strategy.cp == best.strategy.cp
    ]
    inside = [each for each in fewer if each.apart != TP_ACROSS_NODES]
    fitting = [each for each in inside if each.fits]
    if not fitting:
        closest = min(inside, key=lambda each: each.peak.total) if inside else None
        if closest is None:
            return "nothing else uses all GPUs"
        reason = memory_reason(closest.peak, closest.limit_bytes, closest.strategy.pp)
        strategy = closest.strategy
        if (strategy.tp, strategy.pp, strategy.cp) == (cluster.gpus_per_node, 1, 1):
            return f"with tp alone inside a node the model {reason}"
        return f"with fewer stages, {cuts(strategy)} {reason}"
    fastest = max(fitting, key=lambda each: each.tokens_per_s)
    ratio = best.tokens_per_s / fastest.tokens_per_s
    return f"{cuts(fastest.strategy)} fits too, at {compared(ratio)} this"


def _like(candidates: list[Candidate], strategy: Strategy, *, cp: int) -> Candidate | None:
    for each in candidates:
        other = each.strategy
        if (other.cp, other.tp, other.pp) == (cp, strategy.tp, strategy.pp):
            return each
    return None


def next_best(candidates: list[Candidate]) -> str:
    """The second plan and what it costs; and what is faster but put aside."""
    best = candidates[0]
    others = [each for each in candidates[1:] if each.fits]
    second = next((each for each in others if not each.apart), None)
    said = "no other plan fits"
    if second is not None:
        ratio = best.tokens_per_s / second.tokens_per_s
        said = f"{cuts(second.strategy)}: {compared(ratio)} the best"
        share = second.max_tokens_per_s / best.max_tokens_per_s
        if share > 1 + TIE:
            said += f", but {share:.2f}x its tokens/s when there are always more requests"
    aside = max(
        (each for each in others if each.apart), key=lambda each: each.tokens_per_s, default=None
    )
    if aside is not None and aside.tokens_per_s > best.tokens_per_s * (1 + TIE):
        ratio = best.tokens_per_s / aside.tokens_per_s
        said += f"; put aside: {cuts(aside.strategy)}, {compared(ratio)} the best by prediction"
    return said


def what_would_change(
    shape: ModelShape,
    cluster: Cluster,
    work: Inference,
    engine: EngineRates,
    best: Candidate,
) -> list[str]:
    """Other questions near this one whose best plan is another."""
    nodes = max(1, cluster.nodes // 2) * cluster.gpus_per_node
    half = cluster.gpus // 2 if cluster.nodes == 1 else nodes
    lower = "fp8" if work.weight_dtype in ("bf16", "fp16", "fp32") else "int4"
    longer = min(shape.max_positions - work.output, 8 * work.prompt)
    more = 64 if work.batch < 16 else 4 * work.batch
    asked = [
        (f"a batch of {more}", cluster, replace(work, batch=more)),
        (f"weights in {lower}", cluster, replace(work, weight_dtype=lower)),
    ]
    if longer > work.prompt:
        asked.append((f"prompts of {longer}", cluster, replace(work, prompt=longer)))
    if half >= 1 and half < cluster.gpus:
        asked.append((f"{half} GPUs", with_gpus(cluster, half, cluster.gpus_per_node), work))
    said = []
    for name, place, other in asked:
        found = search(shape, place, other, engine, nodes_of_tp=1)
        if not found[0].fits:
            # Of these GPUs the plan itself is what one would run on.
            mesh = replace(best.strategy, sp=False)
            tried = evaluate(shape, place, mesh, other, engine) if place == cluster else found[0]
            stages = tried.strategy.pp
            reason = memory_reason(tried.peak, tried.limit_bytes, stages)
            said.append(f"{name}: {cuts(tried.strategy)} {reason}")
        elif _axes(found[0].strategy) != _axes(best.strategy):
            said.append(f"{name}: {cuts(found[0].strategy)}")
    return said or ["none of: " + ", ".join(name for name, _, _ in asked)]


def _axes(strategy: Strategy) -> tuple[int, ...]:
    return strategy.tp, strategy.pp, strategy.cp
