"""Measured collectives (``comm_*.json``) against :func:`collective_seconds`, at 64 KB and more.

The floor is what one divides in one's head: bytes on the wire by the link's marketed rate, plus one
message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from bench.planner.truth import Pair, Reader, Reading
from pyparallel.planner.communication import Kernel, Model, collective_seconds
from pyparallel.planner.fits import read_fits
from pyparallel.planner.hardware import Cluster, Link, cluster_of

LEAST_BYTES = 65536
SMALL = "less than 64 KB"
KERNELS: dict[str, Kernel] = {
    "vLLM_custom_graph": "vllm_graph",
    "vLLM_custom_eager": "vllm_eager",
    "TRTLLM": "trtllm",
}
GPUS = {
    "a100_sxm": "a100",
    "h100_sxm": "h100",
    "h200_sxm": "h200",
    "b200_sxm": "b200",
    "gb200": "gb200",
    "l40s": "l40s",
    "mi300x": "mi300x",
}
# By sends between two of its nodes, in the same file.
PAIRS_OF_A_MACHINE = {"a100_pairwise_nvlink": "a100-pcie", "h100_pairwise_nvlink": "h100-pcie"}


def measured_in_one_node(content: Mapping[str, Any]) -> Iterator[Pair | str]:
    """``comm_nccl_nvlink_by_system`` and ``comm_custom_allreduce``: fitted to, or between what is."""
    for row in content["rows"]:
        if row["bytes"] < LEAST_BYTES:
            yield SMALL
            continue
        kernel = KERNELS[row["kernel"]] if "kernel" in row else "nccl"
        op = row.get("op", "all_reduce").replace("alltoall", "all_to_all")
        cluster = cluster_of(GPUS[row["system"]], 8)
        # This box's own table; see fit_communication.
        if row["system"] == "l40s":
            cluster = replace(cluster, gpu=replace(cluster.gpu, name="l40s"))
        held = row["bytes"] in read_fits("communication")["tables"][kernel]["bytes"]
        kinds: list[tuple[Model, str, bool]] = [
            ("alpha_beta", "alpha-beta", True),
            ("law", "law of the link", False),
        ]
        if not held:
            kinds.append(("table", "table, sizes between its own", False))
        for model, group, calibrated in kinds:
            predicted = collective_seconds(
                op, row["bytes"], row["gpus"], cluster, kernel=kernel, model=model
            )
            yield _point(group, op, row["bytes"], row["gpus"], cluster, row, predicted, calibrated)


def published(content: Mapping[str, Any]) -> Iterator[Pair | str]:
    """``comm_published_tables``: nccl-tests by others, one node and four."""
    for row in content["rows"]:
        if row["op"] != "all_reduce":
            yield f"{row['op']}: no collective"
            continue
        if row["bytes"] < LEAST_BYTES:
            yield SMALL
            continue
        if row.get("time_us") is None:
            if row["busbw_GBps"] < 1:
                yield "a rate rounded to one digit, and no time"
                continue
            share = 2 * (row["gpus"] - 1) / row["gpus"]
            row = {**row, "time_us": share * row["bytes"] / row["busbw_GBps"] * 1e-3}
        name = row["system"].split(" ")[0]
        inter = "EFA" if "EFA" in row["system"] else None
        gpu = "b200" if name == "b200" else GPUS[name]
        cluster = cluster_of(gpu, row["gpus"], inter=inter)
        predicted = collective_seconds("all_reduce", row["bytes"], row["gpus"], cluster)
        group = f"{row['set']}, nodes {row['nodes']}"
        # The latency of a message between nodes was read off these rows.
        across = row["nodes"] > 1
        yield _point(
            group, "all_reduce", row["bytes"], row["gpus"], cluster, row, predicted, across
        )


def between_nodes(content: Mapping[str, Any]) -> Iterator[Pair | str]:
    """``comm_vidur_a100_h100``; the network of its nodes is fitted to its sends between two of them."""
    rows = content["rows"]
    for row in rows:
        if row["bytes"] < LEAST_BYTES:
            yield SMALL
            continue
        system, op = row["system"], row["op"].replace("send_recv", "send")
        ranks, inside = row["workers"], row["devices_per_node"]
        sends = [
            (other["bytes"], other["time_us"])
            for other in rows
            if other["op"] == "send_recv"
            and other["system"] == system
            and other["devices_per_node"] == 1
        ]
        cluster = cluster_of("h100" if system.startswith("h100") else "a100", 16)
        if sends:
            cluster = replace(cluster, inter=_network(sends))
        if "pairwise" in system:
            cluster = replace(cluster, intra=replace(cluster.intra, name="bridge of a pair"))
            if ranks > 2:
                # Two pairs meet on PCIe.
                cluster = cluster_of(PAIRS_OF_A_MACHINE[system], 4)
        predicted = collective_seconds(op, row["bytes"], ranks, cluster, ranks_per_node=inside)
        own = inside < ranks
        place = "between nodes" if inside < ranks else "in a node"
        group = f"{system} {op} {place}"
        yield _point(group, op, row["bytes"], ranks, cluster, row, predicted, own)


def _network(sends: list[tuple[int, float]]) -> Link:
    smallest, largest = min(sends), max(sends)
    rate = (largest[0] - smallest[0]) / (largest[1] - smallest[1]) * 1e6
    return Link("network of these nodes", smallest[1] * 1e-6, rate / 0.8)


def _point(
    group: str,
    op: str,
    num_bytes: int,
    ranks: int,
    cluster: Cluster,
    row: dict[str, Any],
    predicted: float,
    calibrated: bool,
) -> Pair:
    link = cluster.link(ranks)
    share = {"all_reduce": 2 * (ranks - 1) / ranks, "send": 1.0}.get(op, (ranks - 1) / ranks)
    rate = link.bytes_per_s * (ranks - 1 if link.per_peer else 1)
    return Pair(
        quantity=group,
        predicted=predicted,
        measured=row["time_us"] * 1e-6,
        floor=link.alpha_s + share * num_bytes / rate,
        unit="s",
        calibrated=calibrated,
        label=f"{row['system']} {op} of {num_bytes} bytes by {ranks}",
    )


def _reader(pairs_of: Callable[[Mapping[str, Any]], Iterator[Pair | str]]) -> Reader:
    def read(content: Mapping[str, Any]) -> Reading:
        reading = Reading()
        for found in pairs_of(content):
            if isinstance(found, Pair):
                reading.pairs.append(found)
            else:
                reading.unused[found] += 1
        return reading

    return read


READERS = {
    "comm_nccl_nvlink_by_system.json": _reader(measured_in_one_node),
    "comm_custom_allreduce.json": _reader(measured_in_one_node),
    "comm_published_tables.json": _reader(published),
    "comm_vidur_a100_h100.json": _reader(between_nodes),
}
