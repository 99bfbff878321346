"""Batches over dp replicas: training batches are cut, prompts are answered in their order."""

from __future__ import annotations

import pytest
import torch

from pyparallel.comm.group import Group
from pyparallel.decoding.generate import Generation, generate
from pyparallel.launch import launch
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load
from pyparallel.ops.next_token import Sampling
from pyparallel.testing import assert_equal, poisoned_empty
from pyparallel.training.batch import split_batch
from tests.decoding.test_generate import PROMPTS
from tests.transformers_models import build

FOUR = [*PROMPTS, [9, 9, 3]]
SAMPLED = Sampling(temperature=1.0, top_k=30, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    build("llama tied").save_pretrained(path)
    return str(path)


def answers(model, replicas: Group | None) -> list:
    """Greedy and sampled tokens of four prompts, and of two, and what each rank heard."""
    found = []
    for prompts, sampling in ((FOUR, None), (FOUR, SAMPLED), (FOUR[:2], SAMPLED)):
        heard: list[tuple[int, int]] = []
        made = generate(
            model,
            prompts,
            max_new_tokens=6,
            sampling=sampling,
            on_token=lambda row, token, heard=heard: heard.append((row, token)),
            replicas=replicas,
        )
        check_times(made)
        found.append((made.tokens, heard))
    return found


def check_times(made: Generation) -> None:
    assert made.prefill_s > 0
    assert made.steps == max(len(tokens) for tokens in made.tokens) - 1


def over_replicas(path: str, dp: int, tp: int) -> tuple[int, list]:
    mesh = init_mesh(dp=dp, tp=tp)
    with poisoned_empty():
        return mesh.dp.rank, answers(load(path, mesh), mesh.dp)


@pytest.mark.parametrize(("dp", "tp"), [(2, 2), (3, 1)])
def test_answers_come_in_order_on_every_rank(folder: str, dp: int, tp: int) -> None:
    alone = answers(load(folder, init_mesh()), None)
    ranks = launch(over_replicas, dp * tp, folder, dp, tp, threads=1)
    for _, found in ranks:
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in alone]
    # The last of three replicas has no prompt of the two.
    for case, (tokens, _) in enumerate(alone):
        by_replica = [next(found for r, found in ranks if r == replica) for replica in range(dp)]
        heard = [each for found in by_replica for each in found[case][1]]
        assert sorted({row for row, _ in heard}) == list(range(len(tokens)))
        for row, expected in enumerate(tokens):
            assert [token for heard_row, token in heard if heard_row == row] == expected
    # Replicas that drew with the same numbers would repeat one another.
    assert len({tuple(tokens) for tokens in alone[1][0]}) == len(FOUR)


def split(mesh: Mesh) -> dict:
    ids = torch.arange(12).view(6, 2)
    batch = split_batch({"ids": ids, "weights": [ids[:, 0].float(), None], "steps": 3}, mesh)
    own = ids[2 * mesh.dp.rank : 2 * mesh.dp.rank + 2]
    assert_equal(batch["ids"], own, "ids")
    assert_equal(batch["weights"][0], own[:, 0].float(), "weights")
    assert batch["weights"][1] is None and batch["steps"] == 3
    said = {}
    for name, wrong in {
        "rows": ids[:5],
        "sizes": {"a": ids, "b": ids[:3]},
        "none": {"a": 3},
        "scalar": (ids, torch.tensor(3)),
    }.items():
        with pytest.raises(ValueError, match="batch: ") as error:
            split_batch(wrong, mesh)
        said[name] = str(error.value)
    return said


def split_on_rank() -> dict:
    return split(init_mesh(dp=3))


def test_a_training_batch_is_cut_evenly_or_not_at_all() -> None:
    said = launch(split_on_rank, 3, threads=1)
    assert said[0]["rows"] == (
        "batch: 5 sequences do not divide by dp=3; leave 2 out, or add 1 whose targets are all ignored"
    )
    assert said[0]["sizes"] == "batch: expected tensors of one number of sequences, got 3, 6"
    assert "got no tensor" in said[0]["none"]
    assert "got 6, None" in said[0]["scalar"]
    assert said[1] == said[0]
