"""Kernel tests run in Triton's interpreter; TRITON_INTERPRET=0 runs them compiled, on a GPU."""

import os

# Chosen before triton is imported, which happens with the first kernel.
os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import numpy as np
import pytest
import torch

# Forked ranks on host memory, and compilation without a GPU: the interpreter's business.
HOST_ONLY = (
    "test_collectives",
    "test_fused_collectives",
    "test_whole_model",
    "test_parallel_ops",
    "test_hugging_face",
    "test_compile",
    "test_table",
)


def pytest_collection_modifyitems(config, items):
    """On a GPU the tests of one device run; tests/gpu has the twins of the others."""
    if DEVICE == "cuda":
        here = os.path.dirname(__file__)
        host = [
            item
            for item in items
            if str(item.path).startswith(here) and item.path.stem in HOST_ONLY
        ]
        config.hook.pytest_deselected(items=host)
        items[:] = [item for item in items if item not in host]


@pytest.fixture(autouse=True)
def few_threads():
    """The interpreter's arrays are small: threads only get in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """torch.empty and empty_like give NaN (integers: a large negative number), so that an
    element which a kernel forgets to write is seen."""

    def poison(tensor):
        if tensor.dtype.is_floating_point:
            if tensor.dtype.itemsize == 1:
                tensor.view(torch.uint8).fill_(0x7F)
            else:
                tensor.fill_(float("nan"))
        elif tensor.dtype in (torch.int32, torch.int64):
            tensor.fill_(-77_777)
        return tensor

    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def quiet_numpy():
    """Masked-off lanes hold poison on purpose; numpy warns of what is thrown away."""
    with np.errstate(all="ignore"):
        yield
