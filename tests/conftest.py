"""What holds for every test: one warm server of ranks, a fixed hypothesis profile, gpu tests counted."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing import forkserver

import hypothesis
import pytest
import torch

# What every rank would import by itself otherwise; autograd imports the symbolic shapes.
PRELOAD = [
    "torch",
    "torch.fx.experimental.symbolic_shapes",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "peft",
    "hypothesis",
    "pytest",
    "pyparallel.testing",
    "pyparallel.layers",
]

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")

_gpu_left_out: list[str] = []


@pytest.fixture(scope="session", autouse=True)
def rank_server() -> None:
    """Start the server that ranks are forked from, with everything imported that tests use.

    launch() asks for a shorter preload list, but a server that runs already keeps its own.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch's: small models only wait for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU its tests are left out, however pytest was called, and counted."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_deselected(items: list[pytest.Item]) -> None:
    _gpu_left_out.extend(item.nodeid for item in items if item.get_closest_marker("gpu"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _gpu_left_out:
        terminalreporter.write_line(
            f"{len(_gpu_left_out)} gpu tests need a GPU and did not run", yellow=True
        )
