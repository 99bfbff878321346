"""A launcher that is killed or interrupted leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

LAUNCHER = """
    import os, signal, sys, time
    import torch
    from pyparallel.comm.collectives import all_reduce_raw
    from pyparallel.launch import launch
    from pyparallel.mesh import init_mesh

    def busy(folder):
        group = init_mesh(tp=3).tp
        all_reduce_raw(torch.ones(8), group)
        open(os.path.join(folder, f"pid{group.rank}"), "w").write(str(os.getpid()))
        # Rank 0 sleeps, and the others wait for it inside a collective.
        if group.rank == 0:
            time.sleep(120)
        all_reduce_raw(torch.ones(8), group)

    if __name__ == "__main__":
        # A runner in the background hands down that it is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        launch(busy, 3, sys.argv[1])
"""


@pytest.fixture
def launcher(tmp_path):
    """A process that has three busy ranks, and the processes of its session."""
    script = tmp_path / "launcher.py"
    script.write_text(textwrap.dedent(LAUNCHER))
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    pids = [tmp_path / f"pid{rank}" for rank in range(3)]
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in pids):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    yield process, psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.kill()
    process.communicate()


def all_gone(family: list[psutil.Process]) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(family, timeout=10)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_killing_the_launcher_leaves_no_process(launcher, blow):
    process, family = launcher
    assert len(family) >= 4
    process.send_signal(blow)
    process.wait(10)
    assert not all_gone(family)


def test_ctrl_c_ends_everything(launcher):
    process, family = launcher
    # Ctrl-C reaches every process of the terminal's group.
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in stderr
    assert not all_gone(family)
