"""Whether the hosts of a job can reach each other through the address that Gloo would take.

Gloo listens on the address that the host's own name leads to, unless GLOO_SOCKET_IFNAME names an
interface. Debian and others let that name lead to 127.0.1.1, by a line of /etc/hosts; a rank on another
host then connects to its own, and hears after up to 20 s that it was refused, or nothing for half an
hour.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import socket
import struct
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pyparallel.comm.rendezvous import network_identity

# The request for an interface's IPv4 address, of <linux/sockios.h>.
SIOCGIFADDR = 0x8915
TOLD_S = 5.0


def check_interfaces(store: dist.Store, rank: int, size: int) -> None:
    """A call of all ranks, before Gloo connects them.

    Raises:
        ValueError: on every rank, if there are several hosts and one would listen to itself alone.
            Containers that share their machine's network are one host here.
    """
    own = [network_identity(), _unreachable()]
    store.set(f"pyparallel/interface/{rank}", json.dumps(own))
    if rank == 0:
        keys = [f"pyparallel/interface/{peer}" for peer in range(size)]
        everyone = [json.loads(told) for told in store.multi_get(keys)]
        several = len({identity for identity, _ in everyone}) > 1
        store.set("pyparallel/interfaces", _wrong(everyone) if several else "")
    if wrong := store.get("pyparallel/interfaces").decode():
        store.set(f"pyparallel/interface/{rank}/told", "")
        if rank == 0:
            # The store ends with this rank, and the others have to hear why.
            with suppress(dist.DistStoreError):
                keys = [f"pyparallel/interface/{peer}/told" for peer in range(size)]
                store.wait(keys, timedelta(seconds=TOLD_S))
        raise ValueError(wrong)


def _wrong(everyone: list[Any]) -> str:
    """What keeps the hosts apart, and the way out; "" if nothing does."""
    for rank, (_, why) in enumerate(everyone):
        if why:
            return (
                f"rank {rank}: expected an address that the job's other hosts can reach, got {why}; set "
                f"GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME for GPUs) on each host to its interface "
                f"towards the others, or let its name lead to that interface in /etc/hosts"
            )
    return ""


def _unreachable() -> str:
    """Why no other host can reach what Gloo will listen on here; "" where it can, for all we know."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return ""
    name, found = socket.gethostname(), "none"
    with suppress(OSError):
        for family, kind, _, _, where in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM):
            # Gloo takes the first one that is this host's.
            with suppress(OSError), socket.socket(family, kind) as tried:
                tried.bind(where)
                found = str(where[0])
                break
    if found != "none" and not ipaddress.ip_address(found.partition("%")[0]).is_loopback:
        return ""
    return f"{found}, where its name {name} leads (it has {', '.join(_interfaces()) or 'no other'})"


def _interfaces() -> list[str]:
    """The interfaces with an IPv4 address, but loopback."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                told = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                address = socket.inet_ntoa(told[20:24])
                if not ipaddress.ip_address(address).is_loopback:
                    found.append(f"{name} {address}")
    return found
