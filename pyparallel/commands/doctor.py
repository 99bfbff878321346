"""``pyparallel doctor``: what this machine and this build offer, and why what is missing is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from typing import Any

from pyparallel.version import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print(json.dumps(report))
    else:
        _show(report)
    return 0


def examine() -> dict[str, Any]:
    """Everything the command prints, as data; ``reason`` is null where a thing can be used."""
    import torch

    from pyparallel import backend

    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {
        "versions": {
            "python": platform.python_version(),
            "pyparallel": __version__,
            **{name: _version(name) for name in ("torch", "triton", "transformers")},
        },
        "cpu": {
            "cores": len(os.sched_getaffinity(0)),
            "isa": None if _extension_reason() else _extension().isa(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "shm_free_bytes": None if shm is None else shm.free,
        "compilers": {name: _compiler(name) for name in ("g++", "nvcc", "ninja")},
        "backends": [
            {"name": name, "supports": reason is None, "reason": reason}
            for name, reason in _backend_reasons().items()
        ],
        "ops": backend.table(),
    }


def _extension() -> Any:
    import pyparallel._C

    return pyparallel._C


def _extension_reason() -> str | None:
    try:
        _extension()
    except ImportError as error:
        return f"the C++ extension does not load ({error}); run `make install`"
    return None


def _backend_reasons() -> dict[str, str | None]:
    import torch

    from pyparallel import backend
    from pyparallel.native.cuda import extension as cuda_extension
    from pyparallel.native.triton import missing

    gpu = None if torch.cuda.is_available() else "no GPU is visible to torch"
    cuda = "; ".join(cuda_extension.missing()) or None
    triton = missing()
    if triton is None and gpu is not None:
        triton = f"{gpu}; on CPU tensors it runs in the interpreter, with PYPARALLEL_BACKEND=triton"
    reasons = {"cuda": cuda or gpu, "triton": triton, "cpu": _extension_reason()}
    return {name: reasons.get(name) for name in backend.BACKENDS}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler(name: str) -> str | None:
    if shutil.which(name) is None:
        return None
    output = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=30)
    lines = [line for line in output.stdout.splitlines() if line.strip()]
    return next((line for line in lines if "release" in line), lines[0] if lines else name).strip()


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(show_header=False, box=None)
    for name, version in {**report["versions"], **report["compilers"]}.items():
        facts.add_row(name, version or "[yellow]not found")
    facts.add_row("cores", f"{report['cpu']['cores']} ({report['cpu']['isa']})")
    facts.add_row("gpus", ", ".join(report["gpus"]) or "none")
    if report["shm_free_bytes"] is not None:
        facts.add_row("/dev/shm free", f"{report['shm_free_bytes'] / 1e9:.1f} GB")
    console.print(facts)
    backends = Table("backend", "", "why not", "ops")
    for row in report["backends"]:
        ops = [op for op, names in report["ops"].items() if row["name"] in names]
        mark = "[green]yes" if row["supports"] else "[yellow]no"
        backends.add_row(row["name"], mark, row["reason"] or "", ", ".join(ops))
    console.print(backends)
