"""Overlap of communication and matmul: schedules, their proof, their simulation, their price."""

from pyparallel.overlap.all_gather_linear import all_gather_linear, all_gather_linear_backward
from pyparallel.overlap.check import check
from pyparallel.overlap.linear_reduce_scatter import (
    linear_reduce_scatter,
    linear_reduce_scatter_backward,
)
from pyparallel.overlap.schedule import Schedule, Step

SCHEDULES = {
    "all_gather_linear": all_gather_linear,
    "all_gather_linear_backward": all_gather_linear_backward,
    "linear_reduce_scatter": linear_reduce_scatter,
    "linear_reduce_scatter_backward": linear_reduce_scatter_backward,
}

__all__ = [
    "SCHEDULES",
    "Schedule",
    "Step",
    "all_gather_linear",
    "all_gather_linear_backward",
    "check",
    "linear_reduce_scatter",
    "linear_reduce_scatter_backward",
]
