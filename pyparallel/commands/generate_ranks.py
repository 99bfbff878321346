"""What each rank of ``pyparallel generate`` does."""

from __future__ import annotations

import contextlib
import resource
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyparallel.checkpoint.gguf import GGUFCheckpoint
from pyparallel.checkpoint.source import Checkpoint
from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.commands.generate_output import loading_bar
from pyparallel.commands.questions import Hearing
from pyparallel.decoding.generate import generate
from pyparallel.decoding.logits import teacher_forced_logits
from pyparallel.decoding.stream import stream
from pyparallel.launch import report
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load
from pyparallel.ops.next_token import Sampling
from pyparallel.profiling.profile import profile


@dataclass(frozen=True)
class Job:
    """What all ranks are told.

    Attributes:
        axes: arguments of :func:`init_mesh`.
        weights: None: a GGUF's blocks on the CPU.
        tokenizer: what decodes tokens, where there are stop strings; else None.
        bar: whether rank 0 shows what it loads.
        profile: the file of a trace of all ranks, of what comes behind loading.
    """

    axes: dict[str, Any]
    checkpoint: Checkpoint
    max_new_tokens: int
    sampling: Sampling
    dtype: torch.dtype
    weights: str | None
    stop_strings: tuple[str, ...]
    tokenizer: Any
    bar: bool
    profile: str | None = None


def answer_prompts(
    job: Job, prompts: list[list[int]], micro_batches: int | None, check: bool, reports: bool
) -> dict[str, Any]:
    """Load this rank's share, continue all prompts, tell.

    Args:
        reports: each replica's first rank reports its tokens as they come.
    """
    mesh, model = _loaded(job)
    first = mesh.world.rank == 0
    leads = mesh.tp.rank == mesh.cp.rank == mesh.pp.rank == 0
    on_token = (lambda row, token: report(token)) if reports and leads else None
    with profile(job.profile) if job.profile else contextlib.nullcontext():
        made = generate(
            model,
            prompts,
            max_new_tokens=job.max_new_tokens,
            sampling=job.sampling,
            stop_strings=job.stop_strings,
            tokenizer=job.tokenizer,
            on_token=on_token,
            replicas=mesh.dp,
            micro_batches=micro_batches,
        )
    told = {
        "tokens": made.tokens,
        "prefill_s": made.prefill_s,
        "decode_tokens_per_s": made.decode_tokens_per_s,
        "batch_tokens_per_s": made.batch_tokens_per_s,
        **_held(model),
    }
    if check:
        logits = teacher_forced_logits(model, prompts, made.tokens)
        # Copies: a view would be sent with all that it is a part of.
        told["logits"] = [rows.clone() for rows in logits] if first else None
    return told


def answer_questions(job: Job, places: list[tuple[int, int]]) -> dict[str, Any]:
    """Load this rank's share, and answer until nobody asks.

    Rank 0 reports {} when all are ready, each token, and after each answer its times.
    """
    mesh, model = _loaded(job)
    rank = mesh.world.rank
    hearing = Hearing(*places[rank])
    # All ranks have opened theirs.
    _any_of(mesh, False)
    if rank == 0:
        report({})
    while (question := hearing.next()) is not None:
        started, times = time.perf_counter(), []
        pieces = stream(
            model,
            [question["ids"]],
            max_new_tokens=job.max_new_tokens,
            sampling=job.sampling,
            stop_strings=job.stop_strings,
            tokenizer=job.tokenizer,
        )
        for piece in pieces:
            times.append(time.perf_counter())
            if rank == 0:
                report(piece.token)
            if not piece.last and _any_of(mesh, rank == 0 and hearing.stopped()):
                break
        pieces.close()
        if rank == 0:
            steps, seconds = len(times) - 1, times[-1] - times[0]
            speed = steps / seconds if seconds else 0.0
            report({"prefill_s": times[0] - started, "decode_tokens_per_s": speed})
    return _held(model)


def _loaded(job: Job) -> tuple[Mesh, nn.Module]:
    mesh = init_mesh(**job.axes)
    weights = job.weights
    on_cpu = mesh.device_mesh.device_type == "cpu"
    if weights is None and on_cpu and isinstance(job.checkpoint, GGUFCheckpoint):
        weights = "blocks"
    held = None if weights == "dense" else weights
    with loading_bar(job.bar and mesh.world.rank == 0) as progress:
        model = load(job.checkpoint, mesh, dtype=job.dtype, progress=progress, weights=held)
    return mesh, model


def _any_of(mesh: Mesh, wish: bool) -> bool:
    """Whether some rank of the world wishes it; all learn the same."""
    if mesh.world.size == 1:
        return wish
    flag = torch.tensor([float(wish)], device=mesh.device_mesh.device_type)
    return bool(all_reduce_raw(flag, mesh.world, op="max").item())


def _held(model: nn.Module) -> dict[str, int]:
    return {
        "weight_bytes": sum(p.numel() * p.itemsize for p in model.parameters()),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
