"""What torchrun, or whatever sets its variables, says of the ranks that it started."""

from __future__ import annotations

import os

from pyparallel.limits import environment_number

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MAX_WORLD = 1 << 20


def world_of_torchrun() -> int:
    """How many ranks torchrun, or what sets its variables, started; 1 where nothing did."""
    if any(name not in os.environ for name in VARIABLES):
        return 1
    return environment_number("WORLD_SIZE", None, least=1, most=MAX_WORLD)


def is_first() -> bool:
    """Whether this process is the one that tells what all of torchrun's ranks did."""
    return world_of_torchrun() == 1 or os.environ["RANK"] == "0"
