"""``pyparallel train``: fine-tune a model on text, cut over the ranks of this machine."""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from pyparallel.checkpoint.source import Checkpoint, open_checkpoint
from pyparallel.commands.corpus import token_rows
from pyparallel.commands.train_files import Resumed, check_out, find_checkpoint
from pyparallel.commands.train_flags import add_arguments, asked_run
from pyparallel.commands.train_progress import Progress
from pyparallel.commands.train_ranks import train_rank
from pyparallel.commands.train_run import Run, batch_of
from pyparallel.cut.shard import HeadLayout
from pyparallel.cut.shares import Parts
from pyparallel.launch import launch
from pyparallel.models.config import UnknownArchitectureError
from pyparallel.models.dense import load_tokenizer
from pyparallel.models.load import decoder_config
from pyparallel.models.stage import stages_of

__all__ = ["Run", "add_arguments", "batch_of", "run", "train"]


def run(args: argparse.Namespace) -> int:
    asked = asked_run(args)
    check_out(asked, args.resume)
    checkpoint = open_checkpoint(args.model)
    _check_cut(checkpoint, asked.shares or args.tp, args.pp * args.chunks)
    rows, held_out = _texts(args)
    resumed = find_checkpoint(asked, rows, args.resume)
    tokens = asked.batch * asked.accumulate * args.length
    show = None if args.json else Progress(asked.steps, tokens)
    told = train(
        checkpoint,
        asked,
        rows,
        held_out=held_out,
        resumed=resumed,
        threads=args.threads,
        on_report=show,
        timeout_s=args.timeout,
    )
    if args.json:
        print(json.dumps(told))
    else:
        shares = ", ".join(f"{rank['weight_bytes'] / 1e6:.0f}" for rank in told["ranks"])
        print(f"{told['tokens_per_s']:.0f} tokens/s; MB of weights by rank: {shares}")
    return 0


def _texts(args: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    """Rows to train on, and those that are held out."""
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    text = Path(args.text or sysconfig.get_paths()["stdlib"])
    length = args.length + 1
    if args.eval_every is None:
        return token_rows(tokenizer, text, args.sequences, length), None
    if args.eval_text is not None:
        held_out = token_rows(tokenizer, Path(args.eval_text), args.eval_sequences, length)
        return token_rows(tokenizer, text, args.sequences, length), held_out
    rows = token_rows(tokenizer, text, args.sequences + args.eval_sequences, length)
    return rows[: args.sequences], rows[args.sequences :]


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
    held_out: Tensor | None = None,
    resumed: Resumed | None = None,
    threads: int | None = None,
    timeout_s: float = 300.0,
    on_step: Callable[[int, float, float], None] | None = None,
    on_report: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Start the ranks of ``asked`` and fine-tune on ``rows [N, S + 1]``.

    Args:
        held_out: [E, S + 1], whose loss is looked at every ``asked.eval_every`` steps.
        resumed: where an earlier run stopped.
        on_step: called with (step, loss, norm) as each ends.
        on_report: called with what rank 0 reports, of evaluations and files too, as it comes.

    Returns:
        ``mesh, losses, norms, evaluations: [{step, loss}], first_step, seconds_per_step, tokens_per_s,
        ranks: [{rank, weight_bytes, peak_rss_bytes}]``; the seconds are the median. Of a resumed run,
        what this call did.
    """

    def heard(rank: int, told: tuple[Any, ...]) -> None:
        if on_step is not None and told[0] == "step":
            on_step(*told[1:])
        if on_report is not None:
            on_report(*told)

    ranks = launch(
        train_rank,
        asked.world_size,
        checkpoint,
        asked,
        rows,
        held_out,
        resumed,
        threads=threads,
        timeout_s=timeout_s,
        on_report=heard,
    )
    seconds = sorted(ranks[0].pop("seconds"))
    median = seconds[len(seconds) // 2]
    return {
        "run": asdict(asked),
        "losses": ranks[0]["losses"],
        "norms": ranks[0]["norms"],
        "evaluations": ranks[0]["evaluations"],
        "first_step": 0 if resumed is None else resumed.step,
        "seconds_per_step": median,
        "tokens_per_s": asked.batch * asked.accumulate * (rows.shape[1] - 1) / median,
        "ranks": [
            {"rank": rank, **{key: told[key] for key in ("weight_bytes", "peak_rss_bytes")}}
            for rank, told in enumerate(ranks)
        ],
    }
