"""``pyparallel merge``: the parts of a checkpoint that hosts wrote, each its own, as one."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "parts",
        nargs="+",
        metavar="PART",
        help="what each host has of a checkpoint, by save(per_host=True)",
    )
    add("--out", required=True, metavar="DIR", help="the folder to write")
    add("--overwrite", action="store_true", help="replace the folder if it is there")
    add("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    from pyparallel.saving.merge import merge

    files = merge(args.parts, args.out, overwrite=args.overwrite)
    if args.json:
        print(json.dumps({"folder": args.out, "parts": len(args.parts), "files": files}))
    else:
        print(f"{args.out}: {files} files of {len(args.parts)} parts")
    return 0
