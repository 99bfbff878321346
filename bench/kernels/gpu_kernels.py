"""One GPU's kernels, CUDA C++ and Triton, against torch's own (cuBLAS, cuDNN, flash attention).

    python -m bench.kernels.gpu_kernels [--json FILE] [--only NAME ...] [--seconds-per-case 0.03]
    TRITON_INTERPRET=1 python -m bench.kernels.gpu_kernels --device cpu --scale tiny  # builds and checks

Each result of ours is first held to an fp32 truth; a wrong one is its case's error. Then all take
turns, and a time is the median turn's, of the device alone: a turn's calls queue up while the device
sleeps. Inputs rotate through three times the L2 cache. The limits are measured by the same clock;
the percentage is of the one that binds: a bf16 matmul of 8192^3, or a copy of 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench.kernels.gpu_cases import SIZES, Case, attention_cases, matmul_cases
from bench.kernels.gpu_row_cases import loss_cases, row_cases

TURNS = 5


def distance(result: Any, truth: Any, share: float) -> float:
    """|result - truth| over |truth|, norms of rows: the largest of `share` of the rows."""
    worst = 0.0
    pairs = [(result, truth)] if isinstance(truth, Tensor) else zip(result, truth, strict=True)
    for ours, exact in pairs:
        if ours.shape != exact.shape or not ours.isfinite().all():
            raise ValueError(f"result: expected {list(exact.shape)} finite, got {list(ours.shape)}")
        exact = exact.reshape(-1, exact.shape[-1] if exact.dim() else 1)
        off = (ours.reshape(exact.shape).float() - exact).norm(dim=1) / exact.norm(dim=1)
        worst = max(worst, float(off.nan_to_num().sort().values[math.ceil(share * len(off)) - 1]))
    return worst


def cuda_turn(calls: Sequence[Callable[[], Any]], count: int, hold: float) -> tuple[float, float]:
    """Seconds a call takes the device, and the host to launch; hold: seconds the device sleeps."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(hold * 2e9))
    begin = time.perf_counter()
    start.record()
    for i in range(count):
        calls[i % len(calls)]()
    stop.record()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3 / count, host / count


def host_turn(calls: Sequence[Callable[[], Any]], count: int, hold: float) -> tuple[float, float]:
    begin = time.perf_counter()
    for i in range(count):
        calls[i % len(calls)]()
    seconds = (time.perf_counter() - begin) / count
    return seconds, seconds


def times(
    contenders: dict[str, list[Callable[[], Any]]], turn: Callable[..., Any], seconds: float
) -> dict[str, dict[str, float]]:
    """Microseconds of device and host, medians of turns that the contenders take by rotation."""
    plans, found = {}, {name: [] for name in contenders}
    for name, calls in contenders.items():
        for call in calls:
            call()
        device, host = turn(calls, 3, 2e-3)
        count = min(100, max(3, round(seconds / TURNS / device)))
        plans[name] = (calls, count, 1.5 * host * count + 1e-4)
    for _ in range(TURNS):
        for name, plan in plans.items():
            found[name].append(turn(*plan))
    medians = {
        name: [statistics.median(s) for s in zip(*f, strict=True)] for name, f in found.items()
    }
    return {name: {"us": d * 1e6, "host_us": h * 1e6} for name, (d, h) in medians.items()}


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"


def run_case(
    case: Case, turn: Any, seconds: float, l2: int, limits: dict[str, float]
) -> list[dict]:
    """A row for each kernel of ours; the errors are those of ours, the notes those of rivals."""
    rows = {name: {"case": case.name, "ours": name, "error": None} for name in case.ours}
    contenders, checked, notes = {}, {}, {}
    copies = min(16, max(1, math.ceil(3 * l2 / case.num_bytes)))
    sets = [case.inputs() for _ in range(copies)]
    truth = case.view(case.truth(*sets[0]), *sets[0])
    tolerance = case.roundings * 2**-8
    for name, setup in (case.ours | case.rivals).items():
        try:
            calls = [setup(*inputs) for inputs in sets]
            off = distance(case.view(calls[0](), *sets[0]), truth, case.share)
            if name in rows and not off <= tolerance:
                raise ValueError(f"wrong result: {off:.1e} off, tolerance {tolerance:.1e}")
            contenders[name], checked[name] = calls, {"relative_error": off}
        except Exception as error:
            if name in rows:
                rows[name]["error"] = one_line(error)
            else:
                notes[name] = one_line(error)
    del truth
    measured = times(contenders, turn, seconds)
    rivals = {name: measured[name] | checked[name] for name in case.rivals if name in measured}
    bounds = {"flops": case.flops / limits["flops"], "bytes": case.num_bytes / limits["bytes"]}
    kind = max(bounds, key=bounds.__getitem__)
    for name, row in rows.items():
        row |= {"rivals": rivals, "notes": notes, "tolerance": tolerance, "limit": kind}
        if name in measured:
            us = measured[name]["us"]
            row |= measured[name] | checked[name]
            row["rate"] = (case.flops if kind == "flops" else case.num_bytes) / us * 1e6
            row["percent"] = 100 * bounds[kind] / us * 1e6
            if rivals:
                row["ratio"] = min(r["us"] for r in rivals.values()) / us
    return list(rows.values())


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    rivals = ", ".join(f"{name} {r['us']:.1f}" for name, r in row.get("rivals", {}).items())
    head = f"{row['case']:<34} {row['ours']:<10} "
    if row["error"]:
        return f"{head} ERROR {row['error']}  [{rivals}]"
    unit, scale = ("TFLOP/s", 1e12) if row["limit"] == "flops" else ("GB/s", 1e9)
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
    rate = f"{row['rate'] / scale:.0f} {unit}"
    return f"{head}{row['us']:>9.1f} {ratio:>6} {rate:>12} {row['percent']:>4.0f}%  {rivals}"


def environment(device: torch.device) -> dict[str, str]:
    facts = {
        "command": " ".join(["python -m bench.kernels.gpu_kernels", *sys.argv[1:]]),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    facts["python"] = sys.version.split()[0]
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        facts["machine"] = torch.cuda.get_device_name(device)
        try:
            facts["driver"] = subprocess.check_output(query, text=True).splitlines()[0]
        except (OSError, subprocess.CalledProcessError) as error:
            facts["driver"] = one_line(error)
        facts["cuda"], facts["cudnn"] = str(torch.version.cuda), str(torch.backends.cudnn.version())
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name begins so")
    parser.add_argument("--seconds-per-case", type=float, default=0.03, help="of each contender")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=SIZES, default="full")
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # SDPA warns of each backend that it refuses.
    device, sizes, begin = torch.device(args.device), SIZES[args.scale], time.perf_counter()
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, dtype=torch.bfloat16, device=device, generator=generator)
    turn = cuda_turn if device.type == "cuda" else host_turn
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    facts = environment(device)
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    side, copied = sizes["limits"]
    x, w, source = randn(side, side), randn(side, side), torch.ones(copied // 4, device=device)
    calls = {"flops": [partial(torch.mm, x, w)], "bytes": [partial(source.clone().copy_, source)]}
    limit = times(calls, turn, 2 * args.seconds_per_case)
    work = {"flops": 2 * side**3, "bytes": 2 * copied}
    limits = {name: work[name] / limit[name]["us"] * 1e6 for name in work}
    del x, w, source, calls
    print(f"limits: {limits['flops'] / 1e12:.0f} TFLOP/s, {limits['bytes'] / 1e9:.0f} GB/s\n")
    print(f"{'case':<34} {'ours':<10} {'us':>9} {'ratio':>6} {'achieved':>12} {'':>5}  rivals' us")
    rows: list[dict[str, Any]] = []
    for family in (matmul_cases, attention_cases, row_cases, loss_cases):
        for case in family(sizes, randn):
            if args.only and not case.name.startswith(tuple(args.only)):
                continue
            try:
                found = run_case(case, turn, args.seconds_per_case, l2, limits)
            except Exception as error:
                found = [
                    {"case": case.name, "ours": n, "error": one_line(error)} for n in case.ours
                ]
            print("\n".join(line(row) for row in found), flush=True)
            for name, note in found[0].get("notes", {}).items():
                print(f"    {name} left out: {note}")
            rows += found
            if args.json:
                seconds = time.perf_counter() - begin
                record = {"environment": facts, "limits": limits, "seconds": seconds, "rows": rows}
                args.json.write_text(json.dumps(record, indent=1) + "\n")
    num_errors = sum(bool(row["error"]) for row in rows)
    print(f"\n{len(rows)} rows, {num_errors} errors, {time.perf_counter() - begin:.0f} s")
    return int(num_errors > 0)


if __name__ == "__main__":
    sys.exit(main())
