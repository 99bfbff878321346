"""``python -m tests.comm.ending_script FOLDER``: a script that ends while its message is on its way.

Rank 0 sends twice and ends. Rank 1 asks late for the first message, and never for the second.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from pyparallel.comm import rendezvous
from pyparallel.mesh import init_mesh

LENGTH = 8 << 20
TIMEOUT_S = 4.0
LATE_S = 2.0


def main(folder: Path) -> None:
    # Each rank on a machine of its own, so that torch.distributed carries what they send.
    identity = f"{rendezvous.machine_identity()}/{os.environ['RANK']}"
    rendezvous.machine_identity = lambda: identity
    group = init_mesh(tp=2, timeout_s=TIMEOUT_S).tp.communicator
    if group.rank == 0:
        group.send(torch.full((LENGTH,), 3.0), 1)
        group.send(torch.full((LENGTH,), 4.0), 1)
        return
    time.sleep(LATE_S)
    message = torch.empty(LENGTH)
    group.recv(message, 0)
    (folder / "arrived").write_text(str(bool((message == 3.0).all())))
    # Alive until the sender has given up.
    limit = time.monotonic() + 5 * TIMEOUT_S
    while not (folder / "sender ended").exists() and time.monotonic() < limit:
        time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
