"""Two and three hosts, unevenly many ranks on each: every strategy is the dense model's step."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from pyparallel.launch import launch
from tests.machines.hosts import Hosts
from tests.machines.strategies import steps
from tests.training.training_truth import Truth, truth_of
from tests.transformers_models import build

LOSS = 0.05


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    model, folder = build("llama tied", num_hidden_layers=5), tmp_path_factory.mktemp("dense")
    model.save_pretrained(folder / "model")
    return folder / "model", truth_of(model)


def losses_on(hosts: Hosts, ranks: list[int], saved: tuple[Path, Truth], folder: Path) -> list:
    """What the ranks of these hosts find, which is the same on all."""
    (folder / "model").symlink_to(saved[0])
    (folder / "truth").write_bytes(pickle.dumps(saved[1]))
    for process in hosts.ranks(ranks, "tests.machines.strategies", str(folder)):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    found = [json.loads((folder / str(rank)).read_text()) for rank in range(sum(ranks))]
    assert found == [found[0]] * len(found)
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[2, 1], [1, 3], [2, 1, 1]], ids=str)
def test_a_step_by_every_strategy_is_the_dense_models(
    open_hosts: Callable[[int], Hosts],
    saved: tuple[Path, Truth],
    tmp_path: Path,
    ranks: list[int],
) -> None:
    losses_on(open_hosts(len(ranks)), ranks, saved, tmp_path)


@pytest.mark.slow
def test_lost_packets_change_no_bit(
    hosts: Hosts, saved: tuple[Path, Truth], tmp_path: Path
) -> None:
    try:
        hosts.lose(LOSS)
    except OSError as error:
        pytest.skip(f"this kernel drops no packets by chance ({error})")
    found = losses_on(hosts, [2, 1], saved, tmp_path)
    for host in range(2):
        dropped, sent = hosts.dropped(host)
        assert LOSS / 2 < dropped / sent < 2 * LOSS, (host, dropped, sent)
    assert launch(steps, 3, tmp_path, 3, threads=1) == [found] * 3
