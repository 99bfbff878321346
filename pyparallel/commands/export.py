"""``pyparallel export``: a checkpoint as one Hugging Face folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a folder that pyparallel.save() wrote, a folder of safetensors, or a GGUF file",
    )
    add("--out", required=True, metavar="DIR", help="the folder to write")
    add("--dtype", choices=DTYPES, help="of the tensors; default: as they are")
    add("--overwrite", action="store_true", help="replace the folder if it is there")
    add("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    import torch

    from pyparallel.checkpoint.source import open_checkpoint
    from pyparallel.saving.export import export_checkpoint

    checkpoint = open_checkpoint(args.checkpoint)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    export_checkpoint(checkpoint, args.out, dtype=dtype, overwrite=args.overwrite)
    report = _report(Path(args.out))
    if args.json:
        print(json.dumps(report))
    else:
        print(
            f"{report['folder']}: {report['tensors']} tensors in {len(report['files'])} files, "
            f"{report['bytes'] / 1e6:.1f} MB"
        )
    return 0


def _report(folder: Path) -> dict[str, Any]:
    from pyparallel.checkpoint.source import open_checkpoint

    files = sorted(folder.glob("*.safetensors"))
    return {
        "folder": str(folder),
        "tensors": len(open_checkpoint(folder).shapes),
        "files": [file.name for file in files],
        "bytes": sum(file.stat().st_size for file in files),
    }
