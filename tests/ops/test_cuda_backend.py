"""The cuda backend where it cannot run: an explicit choice says why, the automatic one passes it by."""

from __future__ import annotations

import pytest
import torch

from pyparallel import backend
from pyparallel.comm.group import Group
from pyparallel.native.cuda import extension as cuda_extension

OPS = {
    "rms_norm": (torch.zeros(2, 4), torch.ones(4)),
    "layer_norm": (torch.zeros(2, 4), torch.ones(4), None),
    "activation": (torch.zeros(2, 4), "silu"),
    "gated_activation": (torch.zeros(2, 4), "silu"),
    "cross_entropy_statistics": (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), 0, -100),
}


@pytest.mark.parametrize("op", OPS)
def test_cpu_tensors_are_refused_with_the_reason(op: str) -> None:
    with backend.use("cuda"), pytest.raises(ValueError, match=f"{op}.*cuda: the input is on cpu"):
        backend.call(op, *OPS[op])


@pytest.mark.parametrize("op", OPS)
def test_the_automatic_choice_passes_by(op: str) -> None:
    assert "pyparallel.ops.cuda" not in backend.select(op, *OPS[op]).__module__


@pytest.mark.parametrize("op", ["all_gather_linear", "linear_reduce_scatter"])
def test_pipelines_refuse_cpu_tensors(op: str) -> None:
    call = (torch.zeros(2, 4), torch.zeros(3, 4), None, Group.single(), (2,))
    with backend.use("cuda"), pytest.raises(ValueError, match=f"{op}.*cuda: the input is on cpu"):
        backend.call(op, *call)


def test_what_is_missing_is_a_list_of_reasons() -> None:
    reasons = cuda_extension.missing()
    assert all(isinstance(reason, str) and reason for reason in reasons)
    assert reasons or torch.cuda.is_available()
    facts = cuda_extension.describe()
    assert facts["missing"] == reasons and facts["built"] == cuda_extension.is_built()
