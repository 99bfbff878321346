"""What each rank of ``pyparallel train`` does: load its share, then forward, backward, step in turn."""

from __future__ import annotations

import contextlib
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyparallel.checkpoint.source import Checkpoint
from pyparallel.commands.train_files import MODEL, Resumed, options_of, step_folder
from pyparallel.commands.train_run import Run, batch_of
from pyparallel.launch import report
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load_stages
from pyparallel.profiling.profile import profile
from pyparallel.saving.export import export
from pyparallel.saving.save import restore, save
from pyparallel.training.data import data_parallel
from pyparallel.training.grad_norm import clip_grad_norm_
from pyparallel.training.learning_rate import learning_rate
from pyparallel.training.pipeline import IGNORE_INDEX, Pipeline
from pyparallel.training.pipeline_schedules import schedule_of

# Steps of a profile, behind the first one.
TRACED = 3


def train_rank(
    checkpoint: Checkpoint,
    asked: Run,
    rows: Tensor,
    held_out: Tensor | None = None,
    resumed: Resumed | None = None,
) -> dict[str, Any]:
    """Train, as one of the ranks; what :func:`pyparallel.commands.train.train` returns of it.

    Rank 0 reports ("step", number, loss, norm), ("evaluated", number, loss) and ("saved", number, path).
    """
    mesh = init_mesh(**asked.sizes, shares=asked.shares)
    stages = load_stages(
        checkpoint,
        mesh,
        chunks=asked.chunks,
        order=schedule_of(asked.schedule).order,
        dtype=getattr(torch, asked.dtype),
        sequence_parallel=asked.sequence_parallel,
        recompute=asked.recompute,
    )
    stages = [data_parallel(stage.train(), mesh, engine=asked.engine) for stage in stages]
    parameters = [p for stage in stages for p in stage.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=asked.lr, weight_decay=0.0)
    first = 0
    if resumed is not None:
        restore(stages, resumed.path, mesh, optimizer=optimizer)
        first = resumed.step
    training = _Training(asked, mesh, stages, optimizer)
    losses, norms, seconds, evaluations = [], [], [], []
    tracing = contextlib.ExitStack()
    with tracing:
        for step in range(first, asked.steps):
            done, last = step + 1, step + 1 == asked.steps
            if asked.profile and (step == first + 1 or (step == first and last)):
                tracing.enter_context(profile(asked.profile))
            started = time.perf_counter()
            loss, norm = training.step(rows, step)
            losses.append(loss)
            norms.append(norm)
            seconds.append(time.perf_counter() - started)
            if step == first + TRACED:
                tracing.close()
            _tell(mesh, "step", step, loss, norm)
            if asked.eval_every and (done % asked.eval_every == 0 or last):
                evaluations.append({"step": step, "loss": training.evaluate(held_out)})
                _tell(mesh, "evaluated", step, evaluations[-1]["loss"])
            if asked.save_every and (done % asked.save_every == 0 or last):
                folder = step_folder(asked.out, done)
                extra = options_of(asked, rows, done)
                save(stages, folder, mesh, optimizer=optimizer, extra=extra, overwrite=True)
                _tell(mesh, "saved", step, str(folder))
    if asked.profile:
        _tell(mesh, "saved", asked.steps - 1, asked.profile)
    if asked.out is not None:
        folder = Path(asked.out) / MODEL
        export(stages, folder, mesh, overwrite=True)
        _tell(mesh, "saved", asked.steps - 1, str(folder))
    return {
        "losses": losses,
        "norms": norms,
        "seconds": seconds,
        "evaluations": evaluations,
        "weight_bytes": sum(_local(p).nbytes for p in parameters),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


class _Training:
    """A rank's stages, and what a step and an evaluation do with them."""

    def __init__(
        self, asked: Run, mesh: Mesh, stages: list[nn.Module], optimizer: torch.optim.Optimizer
    ) -> None:
        self.asked, self.mesh, self.stages, self.optimizer = asked, mesh, stages, optimizer
        parts = asked.micro_batches * asked.accumulate
        self.pipeline = Pipeline(stages, mesh, num_microbatches=parts, schedule=asked.schedule)

    def step(self, rows: Tensor, step: int) -> tuple[float, float]:
        """Train on the step's sequences; its loss, and the norm of its gradients."""
        asked, mesh = self.asked, self.mesh
        # What is drawn depends on the step alone: a resumed run draws what it would have drawn.
        torch.manual_seed(asked.seed + step)
        rate = learning_rate(
            asked.lr,
            step,
            steps=asked.steps,
            warmup=asked.warmup,
            schedule=asked.lr_schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = batch_of(rows, step, asked.batch * asked.accumulate)
        own = batch.chunk(mesh.dp.size)[mesh.dp.rank]
        with self._autocast():
            loss = self.pipeline.step(own[:, :-1], own[:, 1:])
        norm = clip_grad_norm_(self.stages, asked.max_norm, mesh)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss), float(norm)

    def evaluate(self, rows: Tensor) -> float:
        """The mean loss over the tokens of ``rows``, in which nothing is dropped."""
        for stage in self.stages:
            stage.eval()
        total = 0.0
        for batch in rows.split(self.asked.batch):
            ids, targets = batch[:, :-1], batch[:, 1:]
            missing = self.asked.batch - len(batch)
            if missing:
                ids = torch.cat([ids, ids[:1].expand(missing, -1)])
                ignored = torch.full_like(targets[:1], IGNORE_INDEX).expand(missing, -1)
                targets = torch.cat([targets, ignored])
            own, wanted = (x.chunk(self.mesh.dp.size)[self.mesh.dp.rank] for x in (ids, targets))
            with self._autocast():
                total += float(self.pipeline.evaluate(own, wanted)) * len(batch)
        for stage in self.stages:
            stage.train()
        return total / len(rows)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.asked.autocast is None:
            return contextlib.nullcontext()
        kind = self.mesh.device_mesh.device_type
        return torch.autocast(kind, getattr(torch, self.asked.autocast))


def _tell(mesh: Mesh, *what: Any) -> None:
    if mesh.world.rank == 0:
        report(what)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
