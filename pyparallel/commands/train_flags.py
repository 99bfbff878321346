"""The flags of ``pyparallel train``, and what they may be together."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pyparallel.commands.flags import AXES, add_model, add_shares, add_timeout, check_numbers
from pyparallel.commands.generate_flags import SHORT_DTYPES
from pyparallel.limits import check_count

if TYPE_CHECKING:
    from pyparallel.commands.train_run import Run

# Those of the library's modules, which import torch; a test holds them together.
RECOMPUTE = ("none", "attention", "layers")
ENGINES = ("ddp", "fsdp")
LR_SCHEDULES = ("constant", "linear", "cosine")
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero_bubble", "zero_bubble_v")
DTYPES = ("float32", "bfloat16")
_SHORT = {short: name for short, name in SHORT_DTYPES.items() if name in DTYPES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = parser.add_argument
    add(
        "--text", metavar="PATH", help="a file, or a folder of .py files; default: Python's library"
    )
    _add_ranks(parser)
    add("--steps", type=int, default=30, help="in all, those before --resume's checkpoint too")
    add("--batch", type=int, default=4, help="sequences at once, over all of --dp")
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="K",
        help="batches whose gradients make one step: the mean over all of their tokens",
    )
    add("--length", type=int, default=64, help="tokens of a sequence")
    add("--sequences", type=int, default=40, help="of the text; they are gone through in turn")
    add("--lr", type=float, default=5e-5, help="of AdamW, its peak")
    add("--warmup", type=int, default=0, metavar="W", help="steps in which it rises to --lr")
    add("--lr-schedule", choices=LR_SCHEDULES, default="constant", help="of the steps after them")
    add("--max-norm", type=float, default=1.0, help="gradients are clipped to it; inf: never")
    add("--seed", type=int, default=0, help="of what is dropped, where the model drops")
    add(
        "--dtype",
        choices=(*DTYPES, *_SHORT),
        default="float32",
        help="of weights, gradients and the optimizer's states",
    )
    add(
        "--autocast",
        choices=("bfloat16", "bf16"),
        help="matmuls in it, with weights, gradients and the optimizer in --dtype",
    )
    _add_files(parser)
    add("--threads", type=int, metavar="N", help="threads per rank; default: cores / ranks")
    add_timeout(parser)
    add("--json", action="store_true", help="print one JSON object instead of text")


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for axis in AXES:
        add(f"--{axis}", type=int, default=1, metavar="N", help=f"ranks along {axis}")
    add_shares(parser)
    add("--sequence-parallel", action="store_true", help="norms and residuals on sequence shards")
    add("--recompute", choices=RECOMPUTE, default="none", help="activations computed again")
    add("--engine", choices=ENGINES, default="ddp", help="what sums gradients over dp and cp")
    add("--schedule", choices=SCHEDULES, default="1f1b", help="of the pipeline")
    add("--chunks", type=int, default=1, metavar="V", help="pipeline stages a rank (default 1)")
    add("--micro-batches", type=int, metavar="M", help="parts of a replica's batch; default: --pp")


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--out",
        metavar="DIR",
        help="the trained model, as a Hugging Face folder: DIR/model; checkpoints: DIR/step-000100",
    )
    add("--save-every", type=int, metavar="N", help="a checkpoint every N steps, and at the end")
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on from a checkpoint, on any mesh; without PATH from the last one in --out, or from "
        "the start where there is none. On the mesh that wrote it: to the same bits",
    )
    add("--profile", metavar="FILE", help="a trace of all ranks, of a few steps, for Perfetto")
    add("--eval-every", type=int, metavar="N", help="loss of held-out text every N steps")
    add(
        "--eval-text", metavar="PATH", help="that text; default: what follows --sequences in --text"
    )
    add("--eval-sequences", type=int, default=8, metavar="E", help="of it (default 8)")


def asked_run(args: argparse.Namespace) -> Run:
    """What the flags ask of each rank.

    Raises:
        ValueError: numbers that can't be served, or flags that don't go together.
    """
    from pyparallel.commands.train_run import Run

    check_numbers(args, AXES)
    if args.micro_batches is not None:
        check_count("--micro-batches", args.micro_batches, args.batch // args.dp or 1)
    if args.batch % args.dp:
        raise ValueError(
            f"--batch: expected a multiple of --dp {args.dp}, got {args.batch}; "
            f"use {-(-args.batch // args.dp) * args.dp}"
        )
    needs_out = {"--save-every": args.save_every is not None, "--resume": args.resume == ""}
    for flag, given in needs_out.items():
        if given and args.out is None:
            raise ValueError(f"{flag}: expected --out, the folder of the checkpoints; give one")
    if args.eval_text is not None and args.eval_every is None:
        raise ValueError("--eval-text: expected --eval-every, how often it is looked at; give one")
    return Run(
        {axis: getattr(args, axis) for axis in AXES},
        args.steps,
        args.batch,
        args.lr,
        _SHORT.get(args.dtype, args.dtype),
        args.sequence_parallel,
        args.recompute,
        args.engine,
        args.schedule,
        args.chunks,
        args.micro_batches or args.pp,
        args.max_norm,
        args.shares,
        accumulate=args.accumulate,
        warmup=args.warmup,
        lr_schedule=args.lr_schedule,
        seed=args.seed,
        autocast=_SHORT.get(args.autocast, args.autocast),
        out=args.out,
        save_every=args.save_every,
        eval_every=args.eval_every,
        profile=args.profile,
    )
