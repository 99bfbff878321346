"""What ``import pyparallel`` brings with it, and what it leaves for when it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pyparallel

# Torch's compiler, FSDP and checkpoints take as long to import as the library; the rest may be absent.
LATER = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "transformers",
    "triton",
)


def test_slow_imports_wait_until_they_are_needed() -> None:
    program = f"import sys, pyparallel; print([name for name in {LATER!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_planning_imports_no_readers_of_files() -> None:
    later = (*LATER, "gguf", "pyparallel.models.load", "pyparallel.decoding")
    program = (
        f"import sys, pyparallel; pyparallel.plan; "
        f"print([name for name in {later!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_modules_are_there_without_an_import_of_their_own() -> None:
    program = (
        "import pyparallel; pyparallel.layers.ColumnParallelLinear, pyparallel.reference.linear; "
        "assert callable(pyparallel.launch) and not hasattr(pyparallel, 'nothing_of_this_name')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_is_there() -> None:
    for name in pyparallel.__all__:
        assert getattr(pyparallel, name) is not None
    assert set(pyparallel.__all__) <= set(dir(pyparallel))
