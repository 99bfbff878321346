"""Two machines on one: network namespaces joined by a veth pair, and torchrun on both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyroute2 import IPRoute, NetNS, netns

ROOT = Path(__file__).parents[2]
PORT = 29_400


class Hosts:
    """Hosts 0 and 1, with addresses of their own on one link."""

    def __init__(self) -> None:
        self.names = [f"pyparallel-{os.getpid()}-{host}" for host in range(2)]
        # A name of an interface has at most 15 characters.
        self.links = [f"pp{os.getpid()}-{host}" for host in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.processes: list[subprocess.Popen[str]] = []

    def open(self) -> None:
        for name in self.names:
            netns.create(name)
        with IPRoute() as here:
            here.link("add", ifname=self.links[0], kind="veth", peer={"ifname": self.links[1]})
            for name, link in zip(self.names, self.links, strict=True):
                index = here.link_lookup(ifname=link)[0]
                here.link("set", index=index, net_ns_fd=name)
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            with NetNS(name) as host:
                index = host.link_lookup(ifname=link)[0]
                host.addr("add", index=index, address=address, prefixlen=24)
                for up in (index, host.link_lookup(ifname="lo")[0]):
                    host.link("set", index=up, state="up")

    def close(self) -> None:
        for name in self.names:
            if name in netns.listnetns():
                # torchrun's ranks are sessions of their own, and would outlive it where they hang.
                for process in _inside(name):
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                # The link goes with its namespaces.
                netns.remove(name)
        for process in self.processes:
            process.communicate()

    def cut(self) -> None:
        """Take the link down: packets are lost, and nobody is told."""
        with NetNS(self.names[1]) as host:
            host.link("set", index=host.link_lookup(ifname=self.links[1])[0], state="down")

    def torchrun(self, ranks: int, module: str, *args: str) -> list[subprocess.Popen[str]]:
        """``python -m module *args`` on ``ranks`` ranks of each host, by torchrun's rendezvous."""
        for host, name in enumerate(self.names):
            command = [sys.executable, "-m", "torch.distributed.run"]
            command += ["--nnodes", "2", "--nproc-per-node", str(ranks)]
            command += ["--rdzv-backend", "c10d", "--rdzv-id", "two-hosts"]
            command += ["--rdzv-endpoint", f"{self.addresses[0]}:{PORT}"]
            command += ["--rdzv-conf", f"is_host={int(host == 0)}"]
            command += ["--local-addr", self.addresses[host], "-m", module, *args]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.machines.enter", name, *command],
                    cwd=ROOT,
                    env=self._environment(host),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return self.processes[-2:]

    def _environment(self, host: int) -> dict[str, str]:
        kept = {
            n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        more = {"GLOO_SOCKET_IFNAME": self.links[host], "OMP_NUM_THREADS": "1"}
        return {**kept, **more, "PYTHONPATH": str(ROOT)}


def _inside(name: str) -> list[int]:
    """The processes in a network namespace."""
    wanted = (Path("/var/run/netns") / name).stat().st_ino
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "ns/net").stat().st_ino == wanted:
                found.append(int(entry.name))
    return found


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts that are gone afterwards, with all that runs on them.

    Raises:
        PermissionError: this user may not make network namespaces.
    """
    hosts = Hosts()
    try:
        hosts.open()
        yield hosts
    finally:
        hosts.close()
