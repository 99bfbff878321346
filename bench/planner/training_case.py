"""A measured step as what the planner takes."""

from __future__ import annotations

from dataclasses import dataclass

from pyparallel.planner.engines import Engine
from pyparallel.planner.hardware import Cluster
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import Strategy, Training


@dataclass(frozen=True)
class Case:
    """One measured step.

    Attributes:
        calibrated: whether constants are fitted on it; see bench/planner/fit_training.py.
        group: of rivals, as :class:`Pair`'s.
    """

    shape: ModelShape
    strategy: Strategy
    training: Training
    cluster: Cluster
    engine: Engine
    seconds: float
    quantity: str = "step time"
    calibrated: bool = False
    group: str = ""
