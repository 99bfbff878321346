"""Options of bench/ops/own_shapes.py: which op, of which sizes and types."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup(
        "pyparallel", "pyparallel: sizes of one's own (bench/ops/own_shapes.py)"
    )
    group.addoption(
        "--op", action="append", help="an op of bench/ops/own_shapes.py; may be repeated"
    )
    group.addoption("--shape", action="append", help="such as 512x1536x576; may be repeated")
    group.addoption("--dtype", action="append", help="fp32, bf16 or fp16; may be repeated")
