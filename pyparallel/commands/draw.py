"""``pyparallel draw``: a picture of what each rank holds, and of what the ranks say to one another."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pyparallel.commands.flags import AXES, add_shares, check_numbers

SCHEDULES = ("1f1b", "gpipe", "interleaved")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="NAME|PATH",
        help="a model that the planner knows, a config.json or its folder, or a GGUF file",
    )
    for axis in AXES:
        add(f"--{axis}", type=int, default=1, metavar="N", help=f"ranks along {axis} (default 1)")
    add("--sp", action="store_true", help="norms and residuals on sequence shards of the tp ranks")
    add_shares(parser)
    add("--tokens", type=int, default=4096, metavar="S", help="of a sequence (default 4096)")
    add("--micro-batch", type=int, default=1, metavar="B", help="sequences at once (default 1)")
    add("--micro-batches", type=int, metavar="M", help="of a step of --pp; default: 2 a rank")
    add("--schedule", choices=SCHEDULES, help="of the pipeline; default: 1f1b, or interleaved")
    add("--chunks", type=int, default=1, metavar="V", help="pipeline stages a rank (default 1)")
    add("--out", metavar="FILE", help="the SVG to write; default: standard output")
    add("--json", action="store_true", help="print the numbers in it as one JSON object")


def run(args: argparse.Namespace) -> int:
    check_numbers(args)
    # Only here: nothing else needs the planner's tables, and a help nothing at all.
    from pyparallel.checkpoint.source import open_checkpoint
    from pyparallel.drawing.draw import draw, facts_of
    from pyparallel.models.load import decoder_config
    from pyparallel.planner.shape import model_shape
    from pyparallel.planner.strategy import Strategy

    if args.json and args.out is None:
        raise ValueError("--json: expected --out FILE beside it, since one output has room for one")
    sizes = {axis: getattr(args, axis) for axis in AXES}
    strategy = Strategy(
        **sizes, sp=args.sp, micro_batch=args.micro_batch, virtual_stages=args.chunks
    )
    is_gguf = Path(args.model).suffix.lower() == ".gguf"
    model = decoder_config(open_checkpoint(args.model)) if is_gguf else model_shape(args.model)
    options: dict[str, Any] = {"shares": args.shares or (), "tokens": args.tokens}
    picture = draw(
        model,
        strategy,
        name=Path(args.model).stem if is_gguf else None,
        micro_batches=args.micro_batches,
        schedule=args.schedule,
        **options,
    )
    if args.out is None:
        sys.stdout.write(picture)
        return 0
    Path(args.out).write_text(picture, encoding="utf-8")
    if args.json:
        print(json.dumps({"file": args.out, **facts_of(model, strategy, **options).as_dict()}))
    else:
        print(f"{args.out}: {len(picture) / 1000:.0f} kB of SVG, for any browser")
    return 0
