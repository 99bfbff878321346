"""Compile every kernel in every shipped configuration and judge what the compiler made of it.

    every kernel        compiles; shared memory within the architecture's limit
    sm_80, sm_90        no spills, and no excuse for them
    tensor-core kernels use mma.sync on sm_80, wgmma on sm_90, tcgen05 on sm_100, MFMA on gfx942
    contiguous data     is loaded and stored 16 bytes a thread

A case that can't meet one of the last two says why in its waiver, which the table prints.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from pyparallel.kernels.configurations import ARCHITECTURES, SHARED_BYTES
from pyparallel.kernels.report.architectures import check_accepted, configured_as
from pyparallel.kernels.report.cases import all_cases, suggestion
from pyparallel.kernels.report.compile_kernel import Case, compile_case

# An architecture, the place of a case among its cases, and where figures are kept.
Task: TypeAlias = "tuple[str, int, str | None]"

BEST_MMA = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
_MFMA_STORES = "MFMA leaves four elements of a column in a lane: bf16 is stored 8 bytes at a time"


def cache_directory() -> Path:
    """Where figures are kept: $XDG_CACHE_HOME or ~/.cache, pyparallel/kernels."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pyparallel" / "kernels"


def shortfalls(case: Case, arch: str, result: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(what is wrong, what is waived with the reason)."""
    if configured_as(arch) != arch:
        # Shown, not judged: the tiles are a relative's.
        return [], [result["error"]] if result["error"] else []
    if result["error"]:
        return [result["error"]], []
    wrong: list[str] = []
    excused: list[str] = []
    if result["spills"] and arch in ("sm_80", "sm_90"):
        wrong.append(f"spills {result['spills']} bytes")
    if result["shared_bytes"] > SHARED_BYTES.get(arch, 1 << 30):
        wrong.append(f"shared memory {result['shared_bytes']} over {SHARED_BYTES[arch]}")
    missing = []
    if case.tensor_core and result["mma"] != BEST_MMA.get(arch, result["mma"]):
        missing.append(f"{result['mma']}, not {BEST_MMA[arch]}")
    if result["max_load_bytes"] < 16:
        missing.append(f"loads {result['max_load_bytes']} bytes")
    if result["max_store_bytes"] < 16:
        if arch.startswith("gfx") and result["max_store_bytes"] == 8 and result["mma"] == "mfma":
            excused.append(f"stores 8 bytes: {_MFMA_STORES}")
        else:
            missing.append(f"stores {result['max_store_bytes']} bytes")
    if case.waiver:
        excused += [f"{what}: {case.waiver}" for what in missing]
        return wrong, excused
    return wrong + missing, excused


def compile_task(task: Task) -> tuple[str, int, dict[str, Any]]:
    """One case in a process of the pool; named by place, because kernels don't travel."""
    arch, index, cache = task
    case = all_cases(configured_as(arch))[index]
    return arch, index, compile_case(case, arch, Path(cache) if cache else None)


def _results(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Every task's result, as it comes. A compiler that ends its process fails its own task alone."""
    left = set(tasks)
    with _pool(jobs) as pool:
        futures = {pool.submit(compile_task, task): task for task in tasks}
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                yield future.result()
                left.remove(futures[future])
    for task in sorted(left):
        with _pool(1) as pool:
            try:
                yield pool.submit(compile_task, task).result()
            except BrokenProcessPool:
                yield *task[:2], {"error": "the compiler ended its process"}


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end at once where this one is asked to: a compile may take a minute."""
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
            raise


@contextmanager
def compiling_environment() -> Iterator[None]:
    """Children must compile, whatever this process does with its kernels."""
    names = ("TRITON_INTERPRET", "PYPARALLEL_BACKEND")
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    fusion = os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        yield
    finally:
        os.environ.update(saved, TRITON_DEFAULT_FP_FUSION=fusion)


def compile_all(
    archs: Sequence[str] = ARCHITECTURES, *, names: Sequence[str] = (), jobs: int | None = None,
    cache: Path | None = None, progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """A row a case: name, arch, config, figures, error, wrong, excused, in the order of cases.

    names: only kernels whose name contains one of these."""
    with compiling_environment():
        check_accepted(archs)
    cases = {
        (arch, index): case
        for arch in archs
        for index, case in enumerate(all_cases(configured_as(arch)))
        if not names or any(name in case.name for name in names)
    }
    if not cases:
        near = suggestion(all_cases(configured_as(archs[0])), names[0])
        raise ValueError(f"kernel: no kernel's name contains one of {', '.join(names)}{near}")
    where = None if cache is None else str(cache)
    tasks = [(arch, index, where) for arch, index in cases]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    jobs = min(jobs or os.cpu_count() or 1, len(tasks))
    with compiling_environment():
        for arch, index, result in _results(tasks, jobs):
            found[arch, index] = result
            if progress:
                progress(len(found), len(tasks))
    rows = []
    for (arch, index), case in cases.items():
        result = found[arch, index]
        wrong, excused = shortfalls(case, arch, result)
        rows.append({"name": case.name, "arch": arch, "config": case.variant, **result,
                     "wrong": wrong, "excused": excused})
    return rows


COLUMNS = (
    ("kernel", "name"), ("configuration", "config"), ("registers", "registers"),
    ("spill bytes", "spills"), ("shared bytes", "shared_bytes"), ("occupancy", "occupancy"),
    ("mma", "mma"), ("count", "mma_count"), ("load", "max_load_bytes"),
    ("store", "max_store_bytes"),
)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for the docs, an architecture at a time, with the excuses numbered below."""
    lines: list[str] = []
    for arch in dict.fromkeys(row["arch"] for row in rows):
        reasons: dict[str, int] = {}
        lines += [f"## {arch}", "", "| " + " | ".join(title for title, _ in COLUMNS) + " | notes |",
                  "|" + " --- |" * (len(COLUMNS) + 1)]
        for row in (r for r in rows if r["arch"] == arch):
            marks = [reasons.setdefault(text, len(reasons) + 1) for text in row["excused"]]
            cells = [str(row.get(key, "")) for _, key in COLUMNS]
            notes = " ".join([*(f"({mark})" for mark in marks), *row["wrong"]])
            lines.append("| " + " | ".join([*cells, notes]) + " |")
        lines += ["", *(f"{mark}. {text}." for text, mark in reasons.items()), ""]
    return "\n".join(lines)
