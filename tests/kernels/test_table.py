"""The op x backend table where Triton's interpreter can run: an explicit `triton` runs its kernels."""

import pytest

from pyparallel.kernels.launch import INTERPRETING
from pyparallel.testing import run_ranks
from tests.ops.test_table import every_op, public_faults


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_selected_is_what_runs(ranks):
    assert INTERPRETING
    for check in (every_op, public_faults):
        for faults in run_ranks(check, ranks, timeout_s=200):
            assert not faults, "\n".join(faults)
