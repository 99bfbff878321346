"""Where one way of doing a thing on GPUs gives way to another: declared here, measured on a machine.

`DECLARED` is what holds where nothing was measured; each number has its reason beside it. A file that
`tests/gpu/measure_pieces.py` wrote takes its place: `PYPARALLEL_TUNING` names it, and it is read at the
first use. All ranks must read the same file; where they do not, peer memory refuses calls that differ.

The file is JSON: {"thresholds": {name: number}, "machine": {field of overlap.machine.Machine: number},
"overlap": [what overlap.choice.ChoiceTable.add takes]}, each of the three optional.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

VARIABLE = "PYPARALLEL_TUNING"

# Fields of overlap.machine.Machine that a file may give.
MEASURABLE = ("peak", "link", "memory", "latency", "launch", "copy_latency", "meeting")


@dataclass(frozen=True)
class Threshold:
    """A number, and why it is that number."""

    value: int
    reason: str


DECLARED: Mapping[str, Threshold] = MappingProxyType(
    {
        "peer_all_reduce_bytes": Threshold(
            8 << 20,
            "Above it NCCL's rings and NVLS have hidden their latency (some 20 us at 8 GPUs), and a "
            "kernel of 32 blocks cannot fill a link of 450 GB/s; vLLM's and TensorRT-LLM's custom "
            "all-reduces stop at 8 MiB as well.",
        ),
        "one_shot_read_bytes": Threshold(
            1400 << 10,
            "One-shot reads (R-1) n in one step, two-shot 2 n (R-1)/R in two: at 3 us a step and 450 "
            "GB/s a GPU they meet where one-shot reads 1.4 MB.",
        ),
        "peer_norm_bytes": Threshold(
            4 << 20,
            "The fused kernel saves two launches and a pass over the rows (6 us and 3 n bytes), but "
            "norms each row in one block: beyond 256 rows of 8192 in bf16, 8 rows for each of its 32 "
            "blocks, the plain path's 132 multiprocessors have caught up.",
        ),
        "copy_bytes": Threshold(
            1 << 30,
            "What a rank may keep of peer memory for copies of one kind: 1.3% of an H100's 80 GB. The "
            "partial sums of 64k rows of 8192 in bf16 fill it; longer inputs go over NCCL.",
        ),
    }
)


@dataclass(frozen=True)
class Tuning:
    """Thresholds by name, facts of the machine, measured overlaps; see the module."""

    thresholds: Mapping[str, int]
    machine: Mapping[str, float] = field(default_factory=dict)
    overlap: tuple[Mapping[str, Any], ...] = ()
    source: str = "declared"

    def __getitem__(self, name: str) -> int:
        return self.thresholds[name]


def read(path: Path) -> Tuning:
    """A measured file over the declared numbers; ValueError, naming the entry, if it is no such file."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{VARIABLE}: expected a readable file, got {path}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{VARIABLE}: expected JSON in {path}, got {error}") from None
    known = {"thresholds", "machine", "overlap", "measured"}
    if not isinstance(found, dict) or not set(found) <= known:
        raise ValueError(f"{path}: expected an object of {sorted(known)}, got {_short(found)}")
    thresholds = {name: threshold.value for name, threshold in DECLARED.items()}
    for name, value in found.get("thresholds", {}).items():
        if name not in DECLARED or not isinstance(value, int) or value < 0:
            raise ValueError(
                f"{path}: thresholds: expected whole numbers for {sorted(DECLARED)}, got "
                f"{name} = {value!r}"
            )
        thresholds[name] = value
    for name, value in found.get("machine", {}).items():
        if name not in MEASURABLE or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(
                f"{path}: machine: expected numbers for {sorted(MEASURABLE)}, got {name} = {value!r}"
            )
    overlap = tuple(found.get("overlap", ()))
    return Tuning(thresholds, found.get("machine", {}), overlap, str(path))


@lru_cache(maxsize=1)
def tuning() -> Tuning:
    """What holds here: the file that `PYPARALLEL_TUNING` names, or what is declared."""
    if path := os.environ.get("PYPARALLEL_TUNING"):
        return read(Path(path))
    return Tuning({name: threshold.value for name, threshold in DECLARED.items()})


def _short(value: object) -> str:
    text = repr(sorted(value) if isinstance(value, dict) else value)
    return text if len(text) < 80 else text[:77] + "..."
