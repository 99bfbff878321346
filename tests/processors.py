"""The numerical tests as other processors would run them: a table, and exit status 1 where one fails.

    python -m tests.processors            every setting of this machine, with ten seeds in turn
    python -m tests.processors --short    three settings, without the sweeps over whole models

A setting is an environment that makes torch, MKL, oneDNN or this library take another instruction set
than the widest this machine has, or another number of threads; a seed makes every random input of
``pyparallel.testing`` and of the small models another one. Each setting has a seed of its own, so that
ten seeds are met too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.backends import cpu

from pyparallel import _C
from tests.decoding.decoder_checks import instruction_sets

ROOT = Path(__file__).parents[1]
# What compares computed numbers with a bound: operations, layers, models, training, forward and back.
# Protocols, counts, errors, files and other numbers of ranks are tested on one setting, by `make test`.
NUMERICAL = (
    "layers/test_column_parallel_linear.py::test_errs_by_rounding_only[3]",
    "layers/test_norm.py",
    "layers/test_parallel_attention.py::test_equals_dense[2]",
    "layers/test_parallel_attention.py::test_a_cache_gives_what_the_whole_sequence_does[1]",
    "layers/test_parallel_attention.py::test_replaces_torchs_module[1]",
    "layers/test_parallel_mlp.py::test_every_activation[2]",
    "layers/test_rotary_embedding.py",
    "layers/test_row_parallel_linear.py::test_errs_by_rounding_only[3]",
    "layers/test_sequence_parallel_norm.py::test_as_dense[2]",
    "models/test_autocast.py::test_as_dense[2]",
    "models/test_context_decoder.py::test_logits_and_gradients_are_the_dense_ones[2-1]",
    "models/test_decoder.py::test_equals_transformers[2]",
    "models/test_decoder.py::test_bfloat16_is_as_near_as_the_dense_model",
    "training/test_activation_memory.py",
    "ops/test_attention_with_lse.py",
    "test_backend.py::test_torch_attention_equals_the_reference",
    "native/test_block_kernels.py::test_any_activation_is_multiplied",
    "decoding/test_block_weights.py::test_logits_and_tokens_are_the_dense_models[1]",
    "ops/test_context_parallel_attention.py::test_outputs_and_gradients_are_the_dense_ones[3]",
    "decoding/test_cpu_decoder.py::test_logits_are_the_modules",
    "decoding/test_cpu_decoder.py::test_logits_beyond_a_chunk_and_a_split",
    "decoding/test_cpu_decoder.py::test_half_precision_logits",
    "decoding/test_cpu_decoder.py::test_bits_are_the_same_run_to_run_and_for_any_number_of_threads",
    "decoding/test_cpu_hugging_face.py::test_logits_with_and_without_padding",
    "native/test_cpu_attention.py",
    "native/test_cpu_kernels.py",
    "native/test_cpu_linear.py",
    "decoding/test_cpu_prefill.py",
    "ops/test_cross_entropy_far_from_zero.py",
    "training/test_data_parallel.py::test_a_step_is_the_dense_models[2-1-2]",
    "decoding/test_int8_weights.py::test_logits_and_tokens_of_the_rounded_model[2]",
    "test_orders.py",
    "models/test_parallelize.py::test_equals_dense[2]",
    "models/test_parallelize_context.py::test_equals_dense",
    "models/test_parallelize_sequence.py::test_equals_dense[2]",
    "training/test_pipeline.py::test_every_schedule_gives_the_dense_gradients[1f1b]",
    "training/test_pipeline.py::test_five_layers_over_three_stages",
    "training/test_sequence_parallel.py::test_as_dense[2-llama]",
    "saving/test_sharded_checkpoint.py::test_training_goes_on",
    "ops/test_vocab_parallel_cross_entropy.py::test_as_dense[3]",
)
# A third of the time, each with smaller relatives in the list: left out by --short.
SWEEPS = (
    "models/test_decoder.py::test_equals_transformers[2]",
    "models/test_parallelize.py::test_equals_dense[2]",
    "models/test_parallelize_context.py::test_equals_dense",
    "test_orders.py",
)
SEEDS = tuple(range(10))
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")


@dataclass(frozen=True)
class Setting:
    """A name and the environment variables that make it."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)


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


def seeded(chosen: list[Setting]) -> list[Setting]:
    """Each setting with a seed of its own, in turn; and the seeds that are left, as it comes."""
    found = []
    for number in range(max(len(chosen), len(SEEDS))):
        setting = chosen[number] if number < len(chosen) else Setting("as it comes")
        seed = SEEDS[number % len(SEEDS)]
        environment = {**setting.environment, "PYPARALLEL_TEST_SEED": str(seed)}
        found.append(Setting(f"{setting.name}, seed {seed}", environment))
    return found


def short() -> list[Setting]:
    """The narrowest instruction sets, one of them for two libraries, and another seed."""
    narrow = {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "PYPARALLEL_ISA": "plain",
    }
    middle = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    other = {"PYPARALLEL_TEST_SEED": "1"}
    return [
        Setting("narrowest", narrow),
        Setting("torch avx2, MKL AVX2", middle),
        Setting("seed 1", other),
    ]


def run(setting: Setting, tests: list[str], extra: list[str]) -> tuple[bool, str]:
    """Whether all passed, and pytest's summary; its report where they did not."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not gpu and not slow", *extra, *tests]
    done = subprocess.run(
        command,
        cwd=ROOT,
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
    left_out = SWEEPS if args.short else ()
    tests = [f"tests/{name}" for name in NUMERICAL if name not in left_out]
    wanted = short() if args.short else seeded(settings())
    if args.only:
        wanted = [setting for setting in wanted if args.only in setting.name]
    print(
        f"{len(tests)} files and tests that compare numbers; torch {torch.__version__} with "
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
