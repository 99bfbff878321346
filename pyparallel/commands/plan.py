"""``pyparallel plan``: which dp x pp x cp x tp a model wants on a cluster, how fast, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyparallel.commands.dry_run import StageCheck
    from pyparallel.planner.plans.inference import InferencePlan
    from pyparallel.planner.plans.shares import Proposal
    from pyparallel.planner.plans.training import TrainingPlan

SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="NAME", help="a shipped name, or a config.json's path")
    add("--gpu", metavar="NAME", help="a shipped name, or a TOML file of one's own")
    add("--gpus", type=int, default=1, metavar="N", help="in all; default 1")
    add("--gpus-per-node", type=int, metavar="N", help="default: as the GPU is usually built")
    add("--intra", metavar="LINK", help="between GPUs of a node: nvlink4, pcie5, or a TOML file")
    add("--inter", metavar="LINK", help="between nodes: ndr, efa, or a TOML file")
    add(
        "--devices",
        metavar="NAME:N,...",
        help="unequal devices that share a model by tp, instead of --gpu: a6000:1,rtx3090:2",
    )
    add(
        "--batch",
        type=int,
        metavar="N",
        help="sequences at once, over all GPUs (default 1), or of a step (default: 4 Mi tokens)",
    )
    add("--prompt", type=int, default=1024, metavar="N", help="tokens of each; default 1024")
    add("--output", type=int, default=128, metavar="N", help="tokens to make; default 128")
    add("--dtype", default="bf16", help="of weights: bf16, fp8, int8, int4, fp4; default bf16")
    add("--kv-dtype", metavar="DTYPE", help="of the KV cache; default 16 bits")
    add(
        "--engine",
        default="vllm",
        help="whose measured rates the times of answers are taken from: vllm, sglang, trtllm",
    )
    add("--train", action="store_true", help="plan training instead of answering")
    add("--sequence", type=int, metavar="N", help="tokens of each in --train; default 8192")
    add("--optimizer", default="adamw", help="of --train: adamw, momentum, sgd; default adamw")
    add("--plot", type=Path, metavar="FILE", help="pictures of the best: .png, .svg or .html")
    add("--draw", type=Path, metavar="FILE", help="what each rank of the best holds, as SVG")
    add(
        "--dry-run",
        action="store_true",
        help="build the best plan's modules without storage, and count their bytes and collectives",
    )
    add(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="measure --gpus CPU ranks of this machine (ten seconds) into a TOML file for --gpu",
    )
    add("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    from pyparallel.planner.plan import plan
    from pyparallel.planner.plans.plots import check_plot, write_plot

    for name in ("calibrate", "draw"):
        _check_folder(f"--{name}", getattr(args, name))
    if args.calibrate is not None:
        return _calibrate(args)
    if args.model is None:
        raise ValueError("--model: expected a model's name, or a config.json's path")
    if (args.gpu is None) == (args.devices is None):
        raise ValueError("--gpu: expected a GPU's name, or --devices instead, one of the two")
    if args.devices is not None:
        return _run_devices(args)
    if args.plot:
        check_plot(args.plot)
    found = plan(
        args.model,
        args.gpu,
        args.gpus,
        gpus_per_node=args.gpus_per_node,
        intra=args.intra,
        inter=args.inter,
        batch=args.batch,
        prompt=args.prompt,
        output=args.output,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        engine=args.engine,
        train=args.train,
        sequence=args.sequence,
        optimizer=args.optimizer,
    )
    if args.plot:
        write_plot(found, args.plot)
    if args.draw:
        _draw(found, args.draw)
    checks = None
    if args.dry_run:
        from pyparallel.commands.dry_run import dry_run

        checks = dry_run(found, train=args.train)
    if args.json:
        told = {"dry_run": [each.as_dict() for each in checks]} if checks else {}
        print(json.dumps(found.as_dict() | told))
    else:
        show(found)
        if checks:
            _show_dry_run(checks)
    return int(not all(each.agrees for each in checks or ()))


def _check_folder(name: str, path: Path | None) -> None:
    """Before anything takes its time."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"{name}: expected a folder that is there, got {path.parent}")


def _calibrate(args: argparse.Namespace) -> int:
    from pyparallel.commands.calibrate import calibrate, write

    found = calibrate(args.gpus)
    write(found, args.calibrate)
    if args.json:
        print(json.dumps(asdict(found)))
    else:
        print(f"{args.calibrate}: {found.ranks} ranks of {found.threads} threads; give it as --gpu")
    return 0


def _draw(found: InferencePlan | TrainingPlan, path: Path) -> None:
    from pyparallel.drawing import draw

    length = getattr(found.work, "sequence", None) or found.work.prompt
    path.write_text(draw(found.shape, found.best.strategy, tokens=length), encoding="utf-8")


def _show_dry_run(checks: Sequence[StageCheck]) -> None:
    print("\ndry run, planned and counted on the modules:")
    rows = [("stage", "layers", "weights", "counted", "KV cache", "counted", "collectives")]
    for each in checks:
        calls = each.calls.values()
        same = sum(planned == counted for planned, counted in calls)
        held = each.cache or ("-", "-")
        numbers = (each.stage, each.layers, *each.weights, *held)
        rows.append((*map(str, numbers), f"{same} of {len(calls)} phases alike"))
    print_aligned(rows)
    if not all(each.agrees for each in checks):
        print("they differ: --json has every number")


def _run_devices(args: argparse.Namespace) -> int:
    from pyparallel.planner.hardware import link_of
    from pyparallel.planner.plan import check_work
    from pyparallel.planner.plans.shares import parse_devices, propose_shares
    from pyparallel.planner.shape import model_shape

    if args.train or args.plot or args.draw or args.dry_run:
        told = "--train, --plot, --draw or --dry-run"
        raise ValueError(f"--devices: expected no {told} beside it")
    shape = model_shape(args.model)
    batch = 1 if args.batch is None else args.batch
    work = check_work(shape, batch, args.prompt, args.output, args.dtype, args.kv_dtype)
    link = None if args.intra is None else link_of(args.intra)
    proposal = propose_shares(shape, parse_devices(args.devices), work, link=link)
    if args.json:
        print(json.dumps({"model": shape.name, **proposal.as_dict()}))
        return 0
    shares = ",".join(map(str, proposal.best.shares))
    print(f"{shape.name} in {work.weight_dtype}: --tp {len(proposal.devices)} --shares {shares}")
    print(f"  {proposal.reason}\n")
    rows = [("device", "share", "holds", "of", "with equal shares")]
    for place, device in enumerate(proposal.devices):
        sizes = (
            proposal.best.memory_bytes[place],
            proposal.best.limit_bytes[place],
            proposal.equal.memory_bytes[place],
        )
        held, limit, equal = (f"{size / 2**30:.1f} GiB" for size in sizes)
        rows.append((device.name, str(proposal.best.shares[place]), held, limit, equal))
    rows.append(("a token", "", f"{1e3 * proposal.best.token_s:.3g} ms", "", _equal_time(proposal)))
    print_aligned(rows)
    return 0


def _equal_time(proposal: Proposal) -> str:
    return f"{1e3 * proposal.equal.token_s:.3g} ms" if proposal.equal.fits else "does not fit"


def show(plan: InferencePlan | TrainingPlan) -> None:
    """The plan for people."""
    cluster = plan.cluster
    place = f"{cluster.gpus} {cluster.gpu.name}, {cluster.gpus_per_node} a node"
    print(f"{plan.shape.name} on {place}; {plan.asked}\n")
    print(f"best: {plan.best_named}")
    for reason in plan.why:
        print(f"  {reason}")
    print()
    print_aligned([plan.HEAD, *(plan.row(each) for each in plan.candidates[:SHOWN])])
    rest = plan.candidates[SHOWN:]
    if rest:
        print(f"and {len(rest)} more, of which {sum(each.fits for each in rest)} fit")
    print(f"\nnext best: {plan.next_best}")
    print("what would change it:")
    for change in plan.changes:
        print(f"  {change}")
    for note in plan.notes:
        print(note)


def print_aligned(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, numbers to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    last = len(widths) - 1
    for row in rows:
        cells = (
            cell.ljust(width) if place in (0, last) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
