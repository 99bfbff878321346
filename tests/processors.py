"""The numerical tests as other processors would run them: a table, and exit status 1 where one fails.

    python -m tests.processors            every setting of this machine, and ten seeds
    python -m tests.processors --short    three settings and one other seed, as CI runs it

A setting is an environment that makes torch, MKL, oneDNN or this library take another instruction set
than the widest this machine has, or another number of threads; a seed makes every random input of
``pyparallel.testing`` and of the small models another one. Numerical tests are all that compare with a
bound or a tolerance.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.backends import cpu

from pyparallel import _C
from tests.decoder_checks import instruction_sets

TESTS = Path(__file__).parent
COMPARES = re.compile(
    r"assert_within|assert_as_dense|assert_close|dense_bound|check_gradients|check_grads|check_logits"
    r"|abs\(\)\.max\(\)|kept_for_backward"
)
# Everything a rank does besides computing is tested on one setting.
LEFT_OUT = ("kernels", "gpu", "machines", "native")
SEEDS = tuple(range(1, 11))
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")


@dataclass(frozen=True)
class Setting:
    """A name and the environment variables that make it."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)


def numerical_tests() -> list[str]:
    """Files of tests that compare with a bound or a tolerance."""
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        inside = path.relative_to(TESTS)
        if inside.parts[0] not in LEFT_OUT and COMPARES.search(path.read_text()):
            found.append(f"tests/{inside.as_posix()}")
    return found


def settings() -> list[Setting]:
    """What this processor can be asked for."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    avx2, avx512, bf16, amx = (flag in flags for flag in FLAGS)
    found = [Setting("as it comes")]
    # torch's own kernels.
    levels = [("default", True), ("avx2", avx2), ("avx512", avx512)]
    found += [
        Setting(f"torch {level}", {"ATEN_CPU_CAPABILITY": level}) for level, has in levels if has
    ]
    levels = [("SSE4_2", True), ("AVX2", avx2), ("AVX512", avx512)]
    found += [
        Setting(f"MKL {level}", {"MKL_ENABLE_INSTRUCTIONS": level}) for level, has in levels if has
    ]
    levels = [
        ("SSE41", True),
        ("AVX2", avx2),
        ("AVX512_CORE", avx512),
        ("AVX512_CORE_BF16", bf16),
        ("AVX512_CORE_AMX", amx),
    ]
    found += [
        Setting(f"oneDNN {level}", {"ONEDNN_MAX_CPU_ISA": level}) for level, has in levels if has
    ]
    if avx2:
        both = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
        found.append(Setting("torch avx2, MKL AVX2", both))
    found += [Setting(f"ours {isa}", {"PYPARALLEL_ISA": isa}) for isa in instruction_sets()]
    found += [Setting(f"{n} threads", {"OMP_NUM_THREADS": str(n)}) for n in (1, 2, 3)]
    return found


def seeds(chosen: tuple[int, ...] = SEEDS) -> list[Setting]:
    return [Setting(f"seed {seed}", {"PYPARALLEL_TEST_SEED": str(seed)}) for seed in chosen]


def short() -> list[Setting]:
    """The narrowest instruction sets, one of them for two libraries, and another seed."""
    narrow = {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "PYPARALLEL_ISA": "plain",
    }
    middle = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    return [Setting("narrowest", narrow), Setting("torch avx2, MKL AVX2", middle), *seeds((1,))]


def run(setting: Setting, tests: list[str], extra: list[str]) -> tuple[bool, str]:
    """Whether all passed, and pytest's summary; its report where they did not."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not gpu and not slow", *extra, *tests]
    done = subprocess.run(
        command,
        cwd=TESTS.parent,
        env={**os.environ, **setting.environment},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", flush=True)
    return done.returncode == 0, lines[-1] if lines else "no output"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.processors", description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", help="settings whose name holds this")
    parser.add_argument("pytest", nargs="*", help="what pytest gets besides")
    args = parser.parse_args(arguments)
    tests = numerical_tests()
    wanted = short() if args.short else [*settings(), *seeds()]
    if args.only:
        wanted = [setting for setting in wanted if args.only in setting.name]
    print(
        f"{len(tests)} files of numerical tests; torch {torch.__version__} with "
        f"{cpu.get_cpu_capability()}, ours {_C.isa()}, {os.cpu_count()} cores",
        flush=True,
    )
    failed = 0
    for setting in wanted:
        start = time.monotonic()
        passed, summary = run(setting, tests, args.pytest)
        failed += not passed
        seconds = time.monotonic() - start
        verdict = "green" if passed else "FAILED"
        print(f"{setting.name:24} {verdict:7} {seconds:5.0f} s  {summary}", flush=True)
    print(f"{len(wanted)} settings, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
