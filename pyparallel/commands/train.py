"""``pyparallel train``: fine-tune a model on text, cut over the ranks of this machine."""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyparallel.checkpoint.source import Checkpoint, open_checkpoint
from pyparallel.commands.corpus import token_rows
from pyparallel.commands.flags import add_shares, add_timeout, check_numbers
from pyparallel.cut.shard import HeadLayout
from pyparallel.cut.shares import Parts, Shares
from pyparallel.launch import launch, report
from pyparallel.limits import check_count
from pyparallel.mesh import AXES, init_mesh
from pyparallel.models.config import UnknownArchitectureError
from pyparallel.models.decoder import RECOMPUTE
from pyparallel.models.dense import load_tokenizer
from pyparallel.models.load import decoder_config, load_stages
from pyparallel.models.stage import stages_of
from pyparallel.training.data import ENGINES, data_parallel
from pyparallel.training.grad_norm import clip_grad_norm_
from pyparallel.training.pipeline import Pipeline
from pyparallel.training.pipeline_schedules import SCHEDULES, schedule_of

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Run:
    """What to train, and how; the same for every rank.

    Attributes:
        sizes: ranks along the axes of the mesh.
        shares: of the tp ranks; None: equal.
        batch: sequences a step, over all of dp.
        micro_batches: parts that a replica's batch is cut into.
        chunks: pipeline stages a rank.
        max_norm: gradients are scaled down to it; inf: never.
    """

    sizes: dict[str, int]
    steps: int
    batch: int
    lr: float
    dtype: str = "float32"
    sequence_parallel: bool = False
    recompute: str = "none"
    engine: str = "ddp"
    schedule: str = "1f1b"
    chunks: int = 1
    micro_batches: int = 1
    max_norm: float = 1.0
    shares: Shares | None = None

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return math.prod(self.sizes.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="a folder of safetensors, or a GGUF file")
    add("--tokenizer", metavar="PATH", help="where the tokenizer is, if not with the model")
    add(
        "--text", metavar="PATH", help="a file, or a folder of .py files; default: Python's library"
    )
    for axis in AXES:
        add(f"--{axis}", type=int, default=1, metavar="N", help=f"ranks along {axis}")
    add_shares(parser)
    add("--sequence-parallel", action="store_true", help="norms and residuals on sequence shards")
    add("--recompute", choices=RECOMPUTE, default="none", help="activations computed again")
    add("--engine", choices=ENGINES, default="ddp", help="what sums gradients over dp and cp")
    add("--schedule", choices=sorted(SCHEDULES), default="1f1b", help="of the pipeline")
    add("--chunks", type=int, default=1, metavar="V", help="pipeline stages a rank (default 1)")
    add("--micro-batches", type=int, metavar="M", help="parts of a replica's batch; default: --pp")
    add("--steps", type=int, default=30)
    add("--batch", type=int, default=4, help="sequences a step, over all of --dp")
    add("--length", type=int, default=64, help="tokens of a sequence")
    add("--sequences", type=int, default=40, help="of the text; they are gone through in turn")
    add("--lr", type=float, default=5e-5, help="of AdamW")
    add("--max-norm", type=float, default=1.0, help="gradients are clipped to it; inf: never")
    add("--dtype", choices=DTYPES, default="float32")
    add("--threads", type=int, metavar="N", help="threads per rank; default: cores / ranks")
    add_timeout(parser)
    add("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    sizes = {axis: getattr(args, axis) for axis in AXES}
    check_numbers(args, AXES)
    if args.micro_batches is not None:
        check_count("--micro-batches", args.micro_batches, args.batch // args.dp or 1)
    if args.batch % args.dp:
        raise ValueError(
            f"--batch: expected a multiple of --dp {args.dp}, got {args.batch}; "
            f"use {-(-args.batch // args.dp) * args.dp}"
        )
    asked = Run(
        sizes,
        args.steps,
        args.batch,
        args.lr,
        args.dtype,
        args.sequence_parallel,
        args.recompute,
        args.engine,
        args.schedule,
        args.chunks,
        args.micro_batches or args.pp,
        args.max_norm,
        args.shares,
    )
    checkpoint = open_checkpoint(args.model)
    _check_cut(checkpoint, asked.shares or args.tp, args.pp * args.chunks)
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    text = Path(args.text or sysconfig.get_paths()["stdlib"])
    rows = token_rows(tokenizer, text, args.sequences, args.length + 1)
    show = None if args.json else _show
    told = train(
        checkpoint, asked, rows, threads=args.threads, on_step=show, timeout_s=args.timeout
    )
    if args.json:
        print(json.dumps(told))
    else:
        shares = ", ".join(f"{rank['weight_bytes'] / 1e6:.0f}" for rank in told["ranks"])
        print(f"{told['tokens_per_s']:.0f} tokens/s; MB of weights by rank: {shares}")
    return 0


def _check_cut(checkpoint: Checkpoint, tp: Parts, stages: int) -> None:
    """Find before ranks start that the model has fewer heads or layers than they need."""
    try:
        config = decoder_config(checkpoint)
    except UnknownArchitectureError:
        return
    HeadLayout.of(config.num_heads, config.num_kv_heads, tp)
    stages_of(config, stages)


def train(
    checkpoint: Checkpoint,
    asked: Run,
    rows: Tensor,
    *,
    threads: int | None = None,
    timeout_s: float = 300.0,
    on_step: Any = None,
) -> dict[str, Any]:
    """Start the ranks of ``asked`` and fine-tune on ``rows [N, S + 1]``.

    Args:
        on_step: called with (step, loss, norm) as each ends.

    Returns:
        ``mesh, losses, norms, seconds_per_step, tokens_per_s, ranks: [{rank, weight_bytes,
        peak_rss_bytes}]``; the seconds are the median.
    """
    heard = None if on_step is None else lambda rank, step: on_step(*step)
    ranks = launch(
        _rank,
        asked.world_size,
        checkpoint,
        asked,
        rows,
        threads=threads,
        timeout_s=timeout_s,
        on_report=heard,
    )
    seconds = sorted(ranks[0].pop("seconds"))[asked.steps // 2]
    return {
        "run": asdict(asked),
        "losses": ranks[0]["losses"],
        "norms": ranks[0]["norms"],
        "seconds_per_step": seconds,
        "tokens_per_s": asked.batch * (rows.shape[1] - 1) / seconds,
        "ranks": [
            {"rank": rank, **{key: told[key] for key in ("weight_bytes", "peak_rss_bytes")}}
            for rank, told in enumerate(ranks)
        ],
    }


def batch_of(rows: Tensor, step: int, batch: int) -> Tensor:
    """The sequences of a step: the next ones, from the start again after the last."""
    return rows[(torch.arange(batch) + step * batch) % rows.shape[0]]


def _rank(checkpoint: Checkpoint, asked: Run, rows: Tensor) -> dict[str, Any]:
    """What each rank does: load its share, then forward, backward and a step of AdamW in turn."""
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
    pipeline = Pipeline(stages, mesh, num_microbatches=asked.micro_batches, schedule=asked.schedule)
    losses, norms, seconds = [], [], []
    for step in range(asked.steps):
        started = time.perf_counter()
        own = batch_of(rows, step, asked.batch).chunk(mesh.dp.size)[mesh.dp.rank]
        loss = pipeline.step(own[:, :-1], own[:, 1:])
        norm = clip_grad_norm_(stages, asked.max_norm, mesh)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        norms.append(float(norm))
        seconds.append(time.perf_counter() - started)
        if mesh.world.rank == 0:
            report((step, losses[-1], norms[-1]))
    return {
        "losses": losses,
        "norms": norms,
        "seconds": seconds,
        "weight_bytes": sum(_local(p).nbytes for p in parameters),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _show(step: int, loss: float, norm: float) -> None:
    print(f"step {step}: loss {loss:.4f}, gradient norm {norm:.3f}", file=sys.stderr, flush=True)
