"""The mutants of `make mutants-numerics` and `make mutants-kernels` still change what they say."""

from __future__ import annotations

import importlib.util

import pytest

from tests.mutants import MUTANTS
from tests.mutation import ROOT, Mutant


def of_kernels() -> list[Mutant]:
    # tests/kernels is no package: its files find one another beside them.
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tests/kernels/mutants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.mutants()


@pytest.mark.parametrize("mutants", [list(MUTANTS), of_kernels()], ids=["numerics", "kernels"])
def test_every_text_is_there_and_so_are_its_tests(mutants: list[Mutant]) -> None:
    assert len(mutants) > 20
    for mutant in mutants:
        assert mutant.old in (ROOT / mutant.path).read_text(), mutant
        assert mutant.old != mutant.new, mutant
        files = [word for word in mutant.tests.split() if word.startswith("tests/")]
        assert files, mutant
        assert all((ROOT / file).exists() for file in files), mutant
