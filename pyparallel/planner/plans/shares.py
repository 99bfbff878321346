"""How much of a model each of unequal devices should hold: ``shares`` of ``init_mesh``.

A token waits for the slowest rank. The modules' own cuts (:mod:`pyparallel.cut.shares`) say what rank i
holds of the weights W and of the KV cache C, near s_i / sum(s) of both, heads in whole groups::

    t = max_i (W_i + C_i) / bandwidth_i  +  reductions

That is least where shares are as the bandwidths, but W_i + C_i must fit the device. Small whole shares
are tried, all of them: the least time that fits wins, then the smallest numbers. Memory binds where
the least time of all does not fit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pyparallel.limits import check_count
from pyparallel.planner.communication import collective_seconds
from pyparallel.planner.engines import PYPARALLEL
from pyparallel.planner.hardware import Cluster, Gpu, Link, gpu_of, link_of
from pyparallel.planner.memory import limit_bytes, weight_bytes
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import BYTES, Inference
from pyparallel.planner.weights import layer_shard, stage_layers, stage_shard

MOST_SHARE = 8
MAX_DEVICES = 64
# Of its bandwidth that a device reaches reading weights; alike for all, so it moves no share.
MEMORY_FRACTION = 0.85


@dataclass(frozen=True)
class Shared:
    """One way to cut a model over the devices.

    Attributes:
        shares: of each device, in the order they were given.
        memory_bytes, limit_bytes: of each.
        token_s: seconds of a token of the batch.
    """

    shares: tuple[int, ...]
    memory_bytes: tuple[float, ...]
    limit_bytes: tuple[float, ...]
    token_s: float

    @property
    def fits(self) -> bool:
        """Whether every device has room."""
        return all(
            held <= limit for held, limit in zip(self.memory_bytes, self.limit_bytes, strict=True)
        )


@dataclass(frozen=True)
class Proposal:
    """What to do with unequal devices.

    Attributes:
        best, equal: the shares to use, and what equal ones would cost.
        binds: "memory" or "speed": what the shares follow.
    """

    devices: tuple[Gpu, ...]
    best: Shared
    equal: Shared
    binds: str

    @property
    def reason(self) -> str:
        """One line for people."""
        if not self.equal.fits:
            place, held, limit = max(
                zip(self.devices, self.equal.memory_bytes, self.equal.limit_bytes, strict=True),
                key=lambda each: each[1] / each[2],
            )
            cost = (
                f"equal shares do not fit: {place.name} would hold {held / 2**30:.1f} GiB "
                f"of {limit / 2**30:.1f}"
            )
        else:
            ratio = self.equal.token_s / self.best.token_s
            cost = f"equal shares fit too, at {ratio:.2f}x the time"
        return f"{self.binds} binds; {cost}"

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "devices": [device.name for device in self.devices],
            "shares": list(self.best.shares),
            "memory_bytes": [round(size) for size in self.best.memory_bytes],
            "limit_bytes": [round(size) for size in self.best.limit_bytes],
            "tpot_s": self.best.token_s,
            "binds": self.binds,
            "equal": {
                "fits": self.equal.fits,
                "tpot_s": self.equal.token_s,
                "memory_bytes": [round(size) for size in self.equal.memory_bytes],
            },
            "why": self.reason,
        }


def parse_devices(text: str) -> list[Gpu]:
    """Devices of "a6000:1,rtx3090:2", or of one's own TOML files: "mac.toml:1,rtx3090".

    Raises:
        ValueError: no such name, a count that is none, or fewer than two devices in all.
    """
    found: list[Gpu] = []
    for part in text.split(","):
        name, _, count = part.strip().partition(":")
        if not name:
            raise ValueError(f"--devices: expected NAME:COUNT,NAME:COUNT, got {text!r}")
        try:
            number = int(count) if count else 1
        except ValueError:
            raise ValueError(f"--devices: expected a count after {name}:, got {count!r}") from None
        check_count(f"--devices: {name}", number, MAX_DEVICES)
        found += [gpu_of(name)] * number
    if not 2 <= len(found) <= MAX_DEVICES:
        raise ValueError(f"--devices: expected 2 to {MAX_DEVICES} in all, got {len(found)}")
    return found


def propose_shares(
    shape: ModelShape, devices: Sequence[Gpu], work: Inference, *, link: Link | None = None
) -> Proposal:
    """The shares of tensor-parallel ranks on these devices, for a batch of ``work``.

    Args:
        link: that all of them share; default: the slowest of their own.

    Raises:
        ValueError: more devices than heads to share out, or a model that they do not hold together.
    """
    if len(devices) > shape.heads:
        raise ValueError(
            f"--devices: expected at most {shape.heads}, a head of {shape.name} for each, "
            f"got {len(devices)}"
        )
    joined = link or min(
        (link_of(each.link) for each in devices), key=lambda each: each.bytes_per_s
    )
    kinds = list(dict.fromkeys(devices))
    tried = []
    for numbers in itertools.product(range(1, MOST_SHARE + 1), repeat=min(len(kinds), 4)):
        if math.gcd(*numbers) == 1:
            # Kinds beyond the fourth share as the last of them.
            by_kind = {kind: numbers[min(place, 3)] for place, kind in enumerate(kinds)}
            shares = tuple(by_kind[device] for device in devices)
            tried.append(_shared(shape, devices, work, joined, shares))
    fastest = _best(tried)
    fitting = [each for each in tried if each.fits]
    equal = _shared(shape, devices, work, joined, (1,) * len(devices))
    if not fitting:
        room = sum(limit_bytes(device) for device in devices)
        needed = sum(equal.memory_bytes)
        raise ValueError(
            f"--devices: expected devices that hold {shape.name} in {work.weight_dtype} together, "
            f"{needed / 2**30:.1f} GiB; they have {room / 2**30:.1f}"
        )
    best = _best(fitting)
    return Proposal(tuple(devices), best, equal, "speed" if best == fastest else "memory")


def _best(tried: Sequence[Shared]) -> Shared:
    """Of the least time, or within 1 % of it: the smallest numbers."""
    least = min(each.token_s for each in tried)
    close = (each for each in tried if each.token_s <= 1.01 * least)
    return min(close, key=lambda each: (sum(each.shares), each.token_s))


def _shared(
    shape: ModelShape,
    devices: Sequence[Gpu],
    work: Inference,
    link: Link,
    shares: tuple[int, ...],
) -> Shared:
    layers = stage_layers(shape, 1)
    each_head = 2 * shape.layers * shape.head_dim * BYTES[work.kv_dtype]
    tokens = work.batch * work.length
    held, times = [], []
    for rank, device in enumerate(devices):
        shard = stage_shard(shape, shares, rank, [0], layers)
        weights = weight_bytes(shard, work.weight_dtype)
        cache = tokens * each_head * layer_shard(shape, shares, rank).kv_heads
        held.append(weights + cache + PYPARALLEL.context_bytes + PYPARALLEL.group_bytes)
        # Of the embedding a token reads a row; a tied one is the head.
        read = weights - 2.0 * shard.embedding * (not shape.tied) + cache
        times.append(read / (MEMORY_FRACTION * device.bandwidth))
    cluster = Cluster(devices[0], len(devices), len(devices), link, link)
    num_bytes = work.batch * shape.hidden * 2
    reduction = collective_seconds("all_reduce", num_bytes, len(devices), cluster, model="law")
    return Shared(
        shares,
        tuple(held),
        tuple(limit_bytes(device) for device in devices),
        max(times) + 2 * shape.layers * reduction,
    )
