"""Several machines on one: network namespaces joined by a bridge, and ranks on all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pyroute2 import NetNS, netns

from tests.machines.packet_loss import dropping_program

ROOT = Path(__file__).parents[2]
PORT = 29_400
# Addresses in the order of the hosts stay in it as texts, by which torchrun numbers them.
MAX_HOSTS = 9


class Hosts:
    """``count`` hosts with addresses of their own, each by one link on a bridge of its own namespace."""

    def __init__(self, count: int) -> None:
        if not 1 <= count <= MAX_HOSTS:
            raise ValueError(f"count: expected 1 to {MAX_HOSTS} hosts, got {count}")
        own = os.getpid()
        self.names = [f"pyparallel-{own}-{host}" for host in range(count)]
        # A name of an interface has at most 15 characters.
        self.links = [f"pp{own}-{host}" for host in range(count)]
        self.addresses = [f"10.77.0.{host + 1}" for host in range(count)]
        self.switch = f"pyparallel-{own}-switch"
        self.processes: list[subprocess.Popen[str]] = []

    def open(self) -> None:
        for name in (self.switch, *self.names):
            netns.create(name)
        with NetNS(self.switch) as switch:
            switch.link("add", ifname="bridge", kind="bridge")
            bridge = switch.link_lookup(ifname="bridge")[0]
            switch.link("set", index=bridge, state="up")
            for name, link in zip(self.names, self.links, strict=True):
                switch.link("add", ifname=f"{link}s", kind="veth", peer={"ifname": link})
                port, end = (switch.link_lookup(ifname=n)[0] for n in (f"{link}s", link))
                switch.link("set", index=port, master=bridge, state="up")
                switch.link("set", index=end, net_ns_fd=name)
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            with NetNS(name) as host:
                index = host.link_lookup(ifname=link)[0]
                host.addr("add", index=index, address=address, prefixlen=24)
                for up in (index, host.link_lookup(ifname="lo")[0]):
                    host.link("set", index=up, state="up")

    def close(self) -> None:
        for name in (*self.names, self.switch):
            if name in netns.listnetns():
                # torchrun's ranks are sessions of their own, and would outlive it where they hang.
                for process in inside(name):
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                # The links go with their namespaces.
                netns.remove(name)
        for process in self.processes:
            process.communicate()

    def cut(self, host: int = 1) -> None:
        """Take the link of ``host`` down: packets are lost both ways, and nobody is told."""
        with NetNS(self.names[host]) as away:
            away.link("set", index=away.link_lookup(ifname=self.links[host])[0], state="down")

    def slow(self, megabits: int) -> None:
        """Let every link carry ``megabits`` a second each way, by the kernel's token bucket."""
        ends = [(self.switch, f"{link}s") for link in self.links]
        for name, link in (*zip(self.names, self.links, strict=True), *ends):
            with NetNS(name) as host:
                index = host.link_lookup(ifname=link)[0]
                rate = megabits * 1_000_000 // 8
                # A queue of 50 ms, as a switch has.
                host.tc("add", "tbf", index, 0x10000, rate=rate, burst=64 * 1024, latency="50ms")

    def lose(self, fraction: float) -> None:
        """Drop this fraction of what every host sends, each packet by its own chance.

        Raises:
            OSError: the kernel has no way to.
        """
        program = dropping_program(fraction)
        for name, link in zip(self.names, self.links, strict=True):
            with NetNS(name) as host:
                index = host.link_lookup(ifname=link)[0]
                host.tc("add", "clsact", index)
                options = {"fd": program, "name": "loss", "parent": "ffff:fff3", "classid": 1}
                host.tc("add-filter", "bpf", index, ":1", direct_action=True, **options)
        os.close(program)

    def dropped(self, host: int) -> tuple[int, int]:
        """Packets that :meth:`lose` has dropped of those that the host sent, and what it sent in all."""
        with NetNS(self.names[host]) as away:
            index = away.link_lookup(ifname=self.links[host])[0]
            sent = away.get_links(index)[0].get_attr("IFLA_STATS64")["tx_packets"]
            for queue in away.get_qdiscs(index):
                if queue.get_attr("TCA_KIND") == "clsact":
                    dropped = queue.get_attr("TCA_STATS")["drop"]
        return dropped, sent + dropped

    def torchrun(
        self, ranks: int | Sequence[int], module: str, *args: str, options: Sequence[str] = ()
    ) -> list[subprocess.Popen[str]]:
        """``python -m module *args`` by torchrun's rendezvous, whose store is on host 0.

        Args:
            ranks: on each host, or one number for all; the first host's come first.
            options: more of torchrun's, such as ``--max-restarts``.
        """
        commands = []
        for host, number in enumerate(self._on_each(ranks)):
            command = [sys.executable, "-m", "torch.distributed.run"]
            command += ["--nnodes", str(len(self.names)), "--nproc-per-node", str(number)]
            command += ["--rdzv-backend", "c10d", "--rdzv-id", "hosts"]
            command += ["--rdzv-endpoint", f"{self.addresses[0]}:{PORT}"]
            command += ["--rdzv-conf", f"is_host={int(host == 0)}"]
            command += ["--local-addr", self.addresses[host], *options, "-m", module, *args]
            commands.append((host, command, {}))
        return self._start(commands)

    def ranks(
        self, ranks: int | Sequence[int], module: str, *args: str
    ) -> list[subprocess.Popen[str]]:
        """``python -m module *args`` on each rank without torchrun, by the variables that it would set.

        A process a rank, in their order; the first rank has the store.
        """
        numbers = self._on_each(ranks)
        commands = []
        for host, number in enumerate(numbers):
            for local in range(number):
                variables = {
                    "RANK": sum(numbers[:host]) + local,
                    "WORLD_SIZE": sum(numbers),
                    "LOCAL_RANK": local,
                    "LOCAL_WORLD_SIZE": number,
                    "MASTER_ADDR": self.addresses[0],
                    "MASTER_PORT": PORT,
                }
                told = {name: str(value) for name, value in variables.items()}
                commands.append((host, [sys.executable, "-m", module, *args], told))
        return self._start(commands)

    def _on_each(self, ranks: int | Sequence[int]) -> list[int]:
        return [ranks] * len(self.names) if isinstance(ranks, int) else list(ranks)

    def _start(
        self, commands: Sequence[tuple[int, list[str], dict[str, str]]]
    ) -> list[subprocess.Popen[str]]:
        for host, command, variables in commands:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.machines.enter", self.names[host], *command],
                    cwd=ROOT,
                    env={**self._environment(host), **variables},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return self.processes[-len(commands) :]

    def _environment(self, host: int) -> dict[str, str]:
        kept = {
            n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        more = {"GLOO_SOCKET_IFNAME": self.links[host], "OMP_NUM_THREADS": "1"}
        return {**kept, **more, "PYTHONPATH": str(ROOT)}


def inside(name: str) -> list[int]:
    """The processes in a network namespace."""
    wanted = (Path("/var/run/netns") / name).stat().st_ino
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "ns/net").stat().st_ino == wanted:
                found.append(int(entry.name))
    return found


@contextmanager
def some_hosts(count: int) -> Iterator[Hosts]:
    """Hosts that are gone afterwards, with all that runs on them.

    Raises:
        PermissionError: this user may not make network namespaces.
    """
    hosts = Hosts(count)
    try:
        hosts.open()
        yield hosts
    finally:
        hosts.close()
