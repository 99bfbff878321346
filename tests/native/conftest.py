"""The instruction sets, each in turn, for tests that ask for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyparallel import _C

ISAS = ["plain", "avx2", "avx512", "avx512_bf16"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """One of the instruction sets that this processor has."""
    before = _C.isa_in_use()
    if ISAS.index(request.param) > ISAS.index(_C.isa()):
        pytest.skip(f"this processor has {_C.isa()}")
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)
