"""What an engine makes of a GPU: five constants, fitted to published measurements of it.

An engine is who serves: its kernels reach a fraction of the memory's and the tensor cores' rates, each
layer costs launches and the tails of kernels, each step and each sequence of it some of the host's
time.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from pyparallel.checkpoint.schema import shown
from pyparallel.limits import check_real
from pyparallel.planner.communication import Kernel
from pyparallel.planner.fits import read_fits, system_of
from pyparallel.planner.names import read_toml
from pyparallel.planner.strategy import check_choice


@dataclass(frozen=True)
class Constants:
    """The five of one engine on one GPU.

    Attributes:
        memory_fraction: of the memory's bandwidth, in matmuls that read weights and in reading KV.
        flops_fraction: of the best matrix product ever seen on the GPU (``Gpu.best_flops``).
        layer_s: seconds of a layer beside its bytes and its flops.
        step_s: seconds of a pass of one stage on the host.
        sequence_s: seconds of each sequence of a decode step: sampling, scheduling, detokenizing.
        staged_layer_s: ``layer_s`` where the model is cut over stages, if that is another; measured on
            a device of one's own, never fitted.
    """

    memory_fraction: float
    flops_fraction: float
    layer_s: float
    step_s: float
    sequence_s: float
    staged_layer_s: float | None = None


@dataclass(frozen=True)
class EngineRates:
    """How requests are served.

    Attributes:
        kernel: whose all_reduce a decode step calls.
        calibrated_on: the file of measurements that the constants are fitted to; "" for a GPU that is
            not in it, whose constants are those of all GPUs that are, fitted together.
        reserves: a request is admitted only when the KV cache has room for its whole answer.
        prefills_first: all prompts that wait are read before any answer goes on.
    """

    name: str
    constants: Constants
    kernel: Kernel
    calibrated_on: str
    reserves: bool
    prefills_first: bool = False


# Whose constants a plan uses unless it is told otherwise: the engine most GPUs were measured with.
DEFAULT_ENGINE = "vllm"


def engine_names() -> tuple[str, ...]:
    """Those that were fitted."""
    return tuple(read_fits("inference")["engines"])


def engine_rates_of(name: str, gpu: str, *, as_unknown: bool = False) -> EngineRates:
    """An engine on a GPU, by the GPU's own name.

    Args:
        as_unknown: as if this GPU had not been measured: the constants of all others.

    Raises:
        ValueError: no engine of that name.
    """
    check_choice("engine", name, engine_names())
    entry = read_fits("inference")["engines"][name]
    system = system_of(gpu)
    if system in entry["constants"]:
        numbers = entry["without" if as_unknown else "constants"][system]
    else:
        numbers = entry["others"]
    known = system in entry["constants"] and not as_unknown
    return EngineRates(
        name=name,
        constants=constants_of(numbers),
        kernel=entry["kernel"],
        calibrated_on=entry["calibrated_on"] if known else "",
        reserves=entry["reserves"],
        prefills_first=entry["prefills_first"],
    )


def engine_of_file(path: Path) -> EngineRates | None:
    """The [engine] of a TOML file of one's own device, as ``pyparallel plan --calibrate`` writes it.

    None without such a table. Its fractions are 1 where it has none: a measured device's rates are those
    that kernels reach.

    Raises:
        ValueError: no TOML, another field, or a number out of range.
    """
    table = read_toml(path).get("engine")
    if table is None:
        return None
    where = f"{path}: [engine]"
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a table, got {shown(table)}")
    numbers = {"memory_fraction": 1.0, "flops_fraction": 1.0}
    for name, value in table.items():
        if name not in Constants.__dataclass_fields__:
            known = ", ".join(Constants.__dataclass_fields__)
            raise ValueError(f"{where}: {shown(name)}: expected one of {known}")
        numbers[name] = check_real(f"{where}: {name}", value, least=0.0)
    for name, field in Constants.__dataclass_fields__.items():
        if name not in numbers and field.default is MISSING:
            raise ValueError(f"{where}: {name}: expected a number, but it is not there")
    return EngineRates("measured", Constants(**numbers), "nccl", path.name, True)


def constants_of(numbers: list[float]) -> Constants:
    """Two fractions, and three times in microseconds."""
    memory, flops, *micro = numbers
    return Constants(memory, flops, *(each * 1e-6 for each in micro))
