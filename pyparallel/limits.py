"""What numbers from outside may be: checked by name, before anything is spawned or allocated for them.

The rule: a launch has at most 64 ranks, as many as one shared memory serves; a rank has at most 4
threads a core and may always have 16; all ranks together have at most 8 a core and may always have 128.
A wait lasts more than 0 seconds and at most a year.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Mapping
from pathlib import Path

MAX_RANKS = 64
MAX_TIMEOUT_S = 365 * 86400.0
# Their libraries start as many threads as these say, or die trying.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
# What a rank has beside its threads: Gloo's, the watches', the pusher of messages.
OTHER_THREADS = 8


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def max_threads() -> int:
    """Threads that one rank may have."""
    return max(16, 4 * cores())


def check_count(
    name: str, value: object, most: int, *, least: int = 1, why: str = "", unit: str = ""
) -> int:
    """``value``, an integer from ``least`` to ``most``; the ValueError names it otherwise."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}: expected an integer, got {_short(value)}")
    number = value.__index__()
    if number < least:
        raise ValueError(f"{name}: expected at least {least}{unit}, got {_short(number)}")
    if number > most:
        raise ValueError(f"{name}: expected at most {most}{why}, got {_short(number)}")
    return number


def check_real(name: str, value: object, *, least: float = -math.inf, above: bool = False) -> float:
    """``value``, a finite number of at least, or ``above``, ``least``."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ValueError(f"{name}: expected a number, got {_short(value)}")
    number = float(value)
    if not math.isfinite(number) or number < least or (above and number == least):
        bound = "" if math.isinf(least) else f" {'above' if above else 'of at least'} {least:g}"
        raise ValueError(f"{name}: expected a finite number{bound}, got {_short(value)}")
    return number


def check_timeout(name: str, value: object) -> float:
    """``value``, seconds that a call may wait."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ValueError(f"{name}: expected seconds, got {_short(value)}")
    number = float(value)
    if not 0 < number <= MAX_TIMEOUT_S:
        raise ValueError(
            f"{name}: expected more than 0 seconds and at most {MAX_TIMEOUT_S:.0f} (a year), "
            f"got {_short(value)}"
        )
    return number


def check_ranks(name: str, value: object) -> int:
    """``value``, a number of ranks on this machine."""
    why = " ranks, what one machine's shared memory serves"
    return check_count(name, value, MAX_RANKS, why=why)


def check_threads(name: str, value: object, world_size: int) -> int:
    """``value``, threads of each of ``world_size`` ranks."""
    most = max_threads()
    why = f" on this machine's {cores()} cores (4 a core, and always 16)"
    number = check_count(name, value, most, why=why)
    total = max(128, 8 * cores())
    if number * world_size > total:
        raise ValueError(
            f"{name}: expected at most {total} threads over all ranks on this machine's {cores()} "
            f"cores, got {world_size} ranks x {number}; use at most {max(1, total // world_size)}"
        )
    return number


def check_environment(environment: Mapping[str, str] | None = None) -> None:
    """The variables that say how many threads a library starts, before one believes them."""
    for name in THREAD_VARIABLES:
        text = (os.environ if environment is None else environment).get(name, "").strip()
        # OpenMP takes a number for each level of nesting.
        for part in text.split(",") if text else ():
            if not part.strip().isascii() or not part.strip().isdigit() or len(part) > 18:
                raise ValueError(f"{name}: expected a number of threads, got {_short(text)}")
            why = f" on this machine's {cores()} cores"
            check_count(name, int(part), max_threads(), why=why)


def environment_number(name: str, default: int | None, *, least: int, most: int) -> int:
    """An integer variable of a job's launcher."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise ValueError(
            f"{name}: expected {least} to {most}, but it is not set; start with torchrun"
        )
    try:
        number = int(text) if len(text) < 20 else -1
    except ValueError:
        number = None
    if number is None or not least <= number <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {_short(text)}")
    return number


def check_process_limit(world_size: int, threads: int) -> None:
    """Raise where the user's limit on processes (``ulimit -u``) has no room for the ranks."""
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if os.geteuid() == 0 or limit == resource.RLIM_INFINITY:
        return
    used = _threads_of(os.geteuid())
    # Torch's pool and our own.
    needed = world_size * (2 * threads + OTHER_THREADS) + 1
    if used + needed > limit:
        raise ValueError(
            f"ulimit -u: this user may have {limit} processes and threads and has {used}, but "
            f"{world_size} ranks of {threads} threads need about {needed}; raise it or ask for fewer"
        )


def _threads_of(user: int) -> int:
    total = 0
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                if place.stat().st_uid == user:
                    total += len(os.listdir(place / "task"))
            except OSError:
                continue
    return total


def _short(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
