"""A plan as pictures: memory by term of each rank, time by term, throughput against latency.

Drawn with matplotlib, an optional extra; an HTML file holds the same pictures as SVG, and the
candidates.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyparallel.planner.plans.explanation import GIB, cuts
from pyparallel.planner.plans.inference import InferencePlan
from pyparallel.planner.plans.search import Candidate
from pyparallel.planner.plans.training import TrainingPlan
from pyparallel.planner.serving import answer_batch

SUFFIXES = (".png", ".html", ".svg")
# Curves of throughput against latency.
DRAWN = 3


def check_plot(path: Path) -> None:
    """Raise before anything is computed where the file can't be drawn.

    Raises:
        ValueError: another suffix, no such folder, or no matplotlib.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--plot: expected a file ending in {', '.join(SUFFIXES)}, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot: expected a folder that is there, got {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "--plot: expected matplotlib to be installed; pip install 'pyparallel-kernels[plot]'"
        ) from None


def write_plot(plan: InferencePlan | TrainingPlan, path: Path) -> None:
    """Write the pictures of ``plan`` to a .png, .svg or .html file."""
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, time, load) = plt.subplots(1, 3, figsize=(16, 5))
    _draw_memory(memory, plan)
    _draw_time(time, plan)
    if isinstance(plan, InferencePlan):
        _draw_load(load, plan)
    else:
        _draw_steps(load, plan)
    figure.suptitle(f"{plan.shape.name} on {plan.cluster.gpus} {plan.cluster.gpu.name}")
    figure.tight_layout()
    if path.suffix == ".html":
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
        path.write_text(_page(plan, buffer.getvalue()), encoding="utf-8")
    else:
        figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_memory(axes: Any, plan: InferencePlan | TrainingPlan) -> None:
    best = plan.best
    stages = [f"stage {each.stage}" for each in best.memory]
    terms = {
        name: [each.terms.get(name, 0.0) / GIB for each in best.memory]
        for name in best.memory[0].terms
    }
    _stack(axes, stages, terms)
    axes.axhline(best.limit_bytes / GIB, color="black", linestyle="--", label="limit")
    axes.set(ylabel="GiB", title=f"memory of a rank: {cuts(best.strategy)}")
    axes.legend(fontsize="small")


def _draw_time(axes: Any, plan: InferencePlan | TrainingPlan) -> None:
    parts = plan.times()
    totals = {name: sum(terms.values()) for name, terms in parts.items()}
    shares = {
        name: [100 * terms[name] / totals[part] for part, terms in parts.items()]
        for name in next(iter(parts.values()))
    }
    _stack(axes, [f"{name}\n{total:.3g} s" for name, total in totals.items()], shares)
    axes.set(ylabel="% of the time", title="time by term")
    axes.legend(fontsize="small")


def _stack(axes: Any, names: list[str], terms: Mapping[str, list[float]]) -> None:
    below = [0.0] * len(names)
    for name, sizes in terms.items():
        axes.bar(names, sizes, bottom=below, label=name)
        below = [low + size for low, size in zip(below, sizes, strict=True)]


def _draw_load(axes: Any, plan: InferencePlan) -> None:
    for candidate in [each for each in plan.candidates if each.fits][:DRAWN]:
        points = load_curve(plan, candidate)
        axes.plot(
            [1e3 * tpot for tpot, _ in points],
            [rate for _, rate in points],
            marker="o",
            label=cuts(candidate.strategy),
        )
    axes.set(xlabel="ms a token", ylabel="tokens/s", title="batches of 1, 2, 4, ...")
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize="small")


def _draw_steps(axes: Any, plan: TrainingPlan) -> None:
    fitting = [each for each in plan.candidates if each.step is not None]
    axes.scatter([each.peak.total / GIB for each in fitting], [each.step.total for each in fitting])
    for each in fitting[:DRAWN]:
        axes.annotate(cuts(each.strategy), (each.peak.total / GIB, each.step.total))
    axes.set(xlabel="GiB of a rank", ylabel="seconds a step", title="memory against time")


def load_curve(plan: InferencePlan, candidate: Candidate) -> list[tuple[float, float]]:
    """Seconds a token, and tokens a second of all replicas, of batches that double up to the largest."""
    found, batch = [], 1
    while batch <= max(1, candidate.max_batch):
        work = replace(plan.work, batch=batch)
        speed = answer_batch(plan.shape, plan.cluster, candidate.strategy, work, plan.rates)
        found.append((speed.tpot_s, candidate.strategy.dp * speed.tokens_per_s))
        batch *= 2
    return found


def _page(plan: InferencePlan | TrainingPlan, picture: str) -> str:
    def cells(tag: str, texts: Sequence[str]) -> str:
        inside = "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
        return f"<tr>{inside}</tr>\n"

    rows = "".join(cells("td", (*plan.row(each), plan.reason(each))) for each in plan.candidates)
    reasons = "".join(f"<li>{html.escape(text)}</li>\n" for text in plan.why)
    title = html.escape(f"{plan.shape.name} on {plan.cluster.gpus} {plan.cluster.gpu.name}")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f"<h1>{title}</h1>\n<p>{html.escape(plan.best_named)}</p>\n<ul>{reasons}</ul>\n"
        f"<p>Next best: {html.escape(plan.next_best)}</p>\n{picture[picture.index('<svg') :]}\n"
        f"<table>\n{cells('th', (*plan.HEAD, 'why'))}{rows}</table>\n</html>\n"
    )
