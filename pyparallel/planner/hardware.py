"""GPUs, links and clusters: what a device can compute, hold and send.

Rates are per GPU and dense (no sparsity); a link's is of one direction. Memory is what the driver
reports, not what is marketed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyparallel.checkpoint.schema import shown
from pyparallel.limits import check_count, check_real
from pyparallel.planner.names import find, read_toml, shipped

# More than any cluster that is planned for has, and few enough to search.
MAX_GPUS = 1 << 20


@dataclass(frozen=True)
class Link:
    """What joins GPUs.

    Attributes:
        alpha_s: seconds that a message costs whatever its size.
        bytes_per_s: of one GPU, one direction; where ``per_peer``, towards each single other GPU.
        per_peer: the GPUs are joined in pairs (xGMI), not through a switch: one that speaks to k others
            has k times the rate.
    """

    name: str
    alpha_s: float
    bytes_per_s: float
    per_peer: bool = False


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        memory_bytes: all of it, as the driver reports it.
        bandwidth: bytes a second of its memory.
        bf16_flops: dense peak of matrix products of bf16 and fp16.
        fp8_flops, fp4_flops, fp32_flops: of those types; 0: it has no such products.
        measured_bf16_flops, measured_fp8_flops: the best matrix product that was seen; 0: not known.
        link, network: names of the links of a node and between nodes that it is usually built with.
        gpus_per_node: how many a node usually has.
    """

    name: str
    arch: str
    memory_bytes: int
    bandwidth: float
    bf16_flops: float
    fp8_flops: float = 0.0
    fp4_flops: float = 0.0
    fp32_flops: float = 0.0
    measured_bf16_flops: float = 0.0
    measured_fp8_flops: float = 0.0
    link: str = "PCIe-4"
    network: str = "HDR"
    gpus_per_node: int = 8

    def peak_flops(self, dtype: str) -> float:
        """The dense peak of products of ``dtype``; where it has none, of the next wider type.

        Weights of int8 or int4 are multiplied as bf16 unless the activations are int8 as well.
        """
        if dtype == "fp32":
            return self.fp32_flops or self.bf16_flops / 2
        if dtype == "fp4" and self.fp4_flops:
            return self.fp4_flops
        if dtype in ("fp8", "fp4"):
            return self.fp8_flops or self.bf16_flops
        return self.bf16_flops

    def best_flops(self, dtype: str) -> float:
        """The best rate that a product of ``dtype`` has been seen to reach; unknown: 0.8 of the peak.

        0.8 is what A100, H100, H200, B200 reach in the tables that do know (0.76 to 0.87). No product
        of 4 bits was measured: twice those of 8 bits, whatever the peak says.
        """
        peak = self.peak_flops(dtype)
        if dtype == "fp4" and self.fp4_flops:
            return min(0.8 * peak, 2 * self.best_flops("fp8"))
        if dtype in ("fp8", "fp4") and self.fp8_flops and self.measured_fp8_flops:
            return peak * self.measured_fp8_flops / self.fp8_flops
        if self.measured_bf16_flops:
            return peak * self.measured_bf16_flops / self.bf16_flops
        return 0.8 * peak


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in equal nodes.

    Attributes:
        gpus: in all.
        gpus_per_node: how many of them share ``intra``; the last node may have fewer.
        intra, inter: the link of GPUs in a node, and of each GPU between nodes.
    """

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    intra: Link
    inter: Link

    @property
    def nodes(self) -> int:
        """How many nodes it takes."""
        return -(-self.gpus // self.gpus_per_node)

    def link(self, ranks: int) -> Link:
        """The slowest link that neighbouring ``ranks`` speak through."""
        return self.intra if ranks <= self.gpus_per_node else self.inter


def gpu_of(name: str | Path) -> Gpu:
    """A shipped GPU by name ("h100", "H100-SXM5-80GB", "a100 40gb"), or the [gpu] table of a TOML file.

    Raises:
        ValueError: no such name (the message gives the nearest), or a table with other fields.
    """
    path = Path(name)
    if path.suffix == ".toml":
        return Gpu(**_table(path, "gpu", Gpu))
    known = shipped("gpus")
    found = find("gpu", str(name), known)
    return Gpu(**_fields(f"gpus: {found}", {"name": found, **known[found]}, Gpu))


def link_of(name: str | Path) -> Link:
    """A shipped link by name ("nvlink4", "pcie5", "ndr", ...), or the [link] table of a TOML file.

    Raises:
        ValueError: as :func:`gpu_of`.
    """
    path = Path(name)
    if path.suffix == ".toml":
        return Link(**_table(path, "link", Link))
    known = shipped("links")
    found = find("link", str(name), known)
    return Link(**_fields(f"links: {found}", {"name": found, **known[found]}, Link))


def cluster_of(
    gpu: str | Path | Gpu,
    gpus: int,
    *,
    gpus_per_node: int | None = None,
    intra: str | Path | Link | None = None,
    inter: str | Path | Link | None = None,
) -> Cluster:
    """``gpus`` of them, with the links they usually have where none are named.

    A TOML file given as ``gpu`` may say ``gpus_per_node`` in its [gpu] and have [intra] and [inter].

    Raises:
        ValueError: an unknown name, or a number out of range.
    """
    device = gpu if isinstance(gpu, Gpu) else gpu_of(gpu)
    count = check_count("gpus", gpus, MAX_GPUS)
    per_node = check_count("gpus-per-node", gpus_per_node or device.gpus_per_node, MAX_GPUS)
    if not isinstance(gpu, Gpu) and Path(gpu).suffix == ".toml":
        tables = read_toml(Path(gpu))
        intra = intra or (Link(**_table(Path(gpu), "intra", Link)) if "intra" in tables else None)
        inter = inter or (Link(**_table(Path(gpu), "inter", Link)) if "inter" in tables else None)
    links = [
        each if isinstance(each, Link) else link_of(each)
        for each in (intra or device.link, inter or device.network)
    ]
    return Cluster(device, count, min(per_node, count), links[0], links[1])


def with_gpus(cluster: Cluster, gpus: int, gpus_per_node: int) -> Cluster:
    """The same devices and links, another number of them."""
    return replace(cluster, gpus=gpus, gpus_per_node=min(gpus_per_node, gpus))


def _table(path: Path, name: str, kind: type) -> dict[str, Any]:
    tables = read_toml(path)
    if not isinstance(tables.get(name), dict):
        raise ValueError(f"{path}: expected a table [{name}]; it has {shown(list(tables))}")
    return _fields(f"{path}: [{name}]", {"name": path.stem, **tables[name]}, kind)


def _fields(where: str, content: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The fields of a table by the types of ``kind``'s own: every number finite and not negative."""
    found: dict[str, Any] = {}
    types = {name: field.type for name, field in kind.__dataclass_fields__.items()}
    for name, value in content.items():
        if name in ("source", "aliases", "notes"):
            continue
        if name not in types:
            raise ValueError(f"{where}: {name}: expected one of {', '.join(types)}")
        if types[name] == "float":
            value = check_real(f"{where}: {name}", value, least=0.0)
        elif types[name] == "int":
            value = check_count(f"{where}: {name}", value, 1 << 62)
        elif not isinstance(value, {"str": str, "bool": bool}[types[name]]):
            raise ValueError(f"{where}: {name}: expected a {types[name]}, got {shown(value)}")
        found[name] = value
    for name, field in kind.__dataclass_fields__.items():
        required = field.default is field.default_factory
        if required and name not in found:
            raise ValueError(f"{where}: {name}: expected a {types[name]}, but it is not there")
    for name in ("bandwidth", "bf16_flops", "bytes_per_s"):
        if found.get(name) == 0:
            raise ValueError(f"{where}: {name}: expected a number above 0, got 0")
    return found
