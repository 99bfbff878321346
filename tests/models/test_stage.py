"""How layers are cut into stages, and that a stage is exactly its part of the model."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from pyparallel.checkpoint.source import CheckpointError, open_checkpoint
from pyparallel.comm.group import Group
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.config import DecoderConfig, from_hugging_face
from pyparallel.models.decoder import Decoder
from pyparallel.models.fill import fill
from pyparallel.models.load import decoder_config, load, load_stages
from pyparallel.models.stage import Stage, partition, stages_of, stages_of_rank, tied_copies
from pyparallel.testing import assert_equal, poisoned_empty
from tests.transformers_models import build, config_of

FAMILIES = ("llama", "llama tied", "gpt2", "gpt_neox")
LAYERS = 5
IDS = [[5, 9, 2, 40, 33, 8, 1], [7, 7, 3, 12, 50, 2, 9]]


def brute(costs: list[float], parts: int, first: float, last: float) -> tuple[float, float]:
    """(largest cost, sum of squares) of the best of all cuts."""
    found = []
    for inner in itertools.combinations(range(1, len(costs)), parts - 1):
        cuts = [0, *inner, len(costs)]
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise(cuts)]
        sums[0] += first
        sums[-1] += last
        found.append((max(sums), sum(s * s for s in sums)))
    return min(found)


def test_the_partition_is_the_best_of_all() -> None:
    chance = random.Random(1)
    for _ in range(200):
        costs = [float(chance.randint(1, 9)) for _ in range(chance.randint(1, 9))]
        parts = chance.randint(1, len(costs))
        first, last = float(chance.randint(0, 20)), float(chance.randint(0, 20))
        ranges = partition(costs, parts, first=first, last=last)
        assert [number for r in ranges for number in r] == list(range(len(costs)))
        assert all(len(r) for r in ranges)
        sums = [sum(costs[number] for number in r) for r in ranges]
        sums[0] += first
        sums[-1] += last
        assert (max(sums), sum(s * s for s in sums)) == brute(costs, parts, first, last)


def test_embedding_and_head_count() -> None:
    """SmolLM2-135M: its head is worth 8 of its 30 layers, and so is its embedding's memory."""
    config = decoder_config_of(
        "llama tied",
        num_hidden_layers=30,
        vocab_size=49152,
        hidden_size=576,
        head_dim=64,
        intermediate_size=1536,
    )
    assert [len(s.layers) for s in stages_of(config, 2)] == [19, 11]
    assert [len(s.layers) for s in stages_of(config, 2, balance="memory")] == [15, 15]


def decoder_config_of(family: str, **changes: object) -> DecoderConfig:
    return from_hugging_face(config_of(family, **changes).to_dict())


def test_more_stages_than_layers_are_refused() -> None:
    config = decoder_config_of("llama")
    with pytest.raises(ValueError, match=r"stages: expected 1 to 2, .* got 3; use a smaller pp"):
        stages_of(config, 3)
    with pytest.raises(ValueError, match="balance: expected one of compute, memory, got 'time'"):
        stages_of(config, 2, balance="time")
    with pytest.raises(ValueError, match="order: expected one of loop, v, got 'w'"):
        stages_of_rank(2, 0, 2, order="w")


def test_every_stage_has_one_rank() -> None:
    for order, ranks, chunks in itertools.product(("loop", "v"), (1, 2, 3), (1, 2, 3)):
        held = [stages_of_rank(ranks, rank, chunks, order=order) for rank in range(ranks)]
        assert sorted(itertools.chain(*held)) == list(range(ranks * chunks))
    assert stages_of_rank(3, 0, 2, order="v") == [0, 5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for family in FAMILIES:
        made[family] = str(tmp_path_factory.mktemp("model"))
        build(family, num_hidden_layers=LAYERS).save_pretrained(made[family])
    return made


def whole_and_stages(folder: str, count: int) -> tuple[Decoder, list[Decoder]]:
    """One process holds all stages."""
    checkpoint = open_checkpoint(folder)
    config = decoder_config(checkpoint)
    made = []
    for stage in (Stage.whole(config.num_layers), *stages_of(config, count)):
        model = Decoder(config, "meta", torch.float32, group=Group.single(), stage=stage)
        fill(model, checkpoint, device="cpu")
        made.append(model)
    return made[0], made[1:]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_one_after_another_are_the_model(
    folders: dict[str, str], family: str, count: int
) -> None:
    whole, stages = whole_and_stages(folders[family], count)
    dense = dict(whole.named_parameters())
    seen: set[str] = set()
    for stage in stages:
        copies = tied_copies(stage)
        for name, parameter in stage.named_parameters():
            owner = copies.get(name, name)
            assert_equal(parameter, dense[owner], f"{family} {name}")
            assert (owner in seen) == (name in copies)
            seen.add(owner)
    assert seen == set(dense)
    tied = whole.config.tied
    assert tied_copies(stages[-1]) == ({"head.weight": "embedding.weight"} if tied else {})
    assert tied_copies(torch.nn.ModuleDict({"module": stages[-1]})) == (
        {"module.head.weight": "embedding.weight"} if tied else {}
    )
    assert not tied_copies(whole)
    assert not tied_copies(stages[0])
    assert stages[-1].layers[0] is stages[-1].get_submodule(
        f"layers.{stages[-1].stage.layers.start}"
    )

    x = ids = torch.tensor(IDS)
    for stage in stages:
        x = stage(x)
    assert_equal(x, whole(ids), family)


def test_the_state_dict_of_a_stage_is_the_models(folders: dict[str, str]) -> None:
    whole, stages = whole_and_stages(folders["gpt2"], 3)
    dense = whole.state_dict()
    joined = {}
    for stage in stages:
        joined |= stage.state_dict()
    assert list(joined) == list(dense)


def read_only_own(folders: dict[str, str]) -> None:
    mesh = init_mesh(pp=2, tp=2)
    for family, folder in folders.items():
        checkpoint = open_checkpoint(folder)
        read: set[str] = set()
        copy = checkpoint._copy
        checkpoint._copy = lambda name, *rest, seen=read, copy=copy: (
            seen.add(name),
            copy(name, *rest),
        )
        with poisoned_empty():
            model = load(checkpoint, mesh)
        numbers = {int(part) for name in read for part in name.split(".") if part.isdigit()}
        assert numbers == set(model.stage.layers), family
        assert model.stage.index == mesh.pp.rank
        first, last = (
            ("embed_tokens", "wte", "embed_in"),
            ("lm_head", "embed_out", "final_layer_norm"),
        )
        assert any(part in name for name in read for part in first) == (
            model.stage.is_first or model.config.tied
        )
        if model.stage.is_first:
            assert not any(part in name for name in read for part in last)
        assert all(p.isfinite().all() for p in model.parameters())
        with poisoned_empty():
            chunks = load_stages(folder, mesh, chunks=2, order="v")
        assert [c.stage.index for c in chunks] == ([0, 3] if mesh.pp.rank == 0 else [1, 2])
    with pytest.raises(ValueError, match=r"stages: expected 1 to 5, .* got 6"):
        load_stages(folder, mesh, chunks=3)


def test_a_rank_reads_its_stages_tensors_only(folders: dict[str, str]) -> None:
    launch(read_only_own, 4, folders, threads=1)


def test_a_missing_tensor_of_a_stage_is_named(folders: dict[str, str]) -> None:
    checkpoint = open_checkpoint(folders["llama"])
    del checkpoint.shapes["model.layers.4.mlp.up_proj.weight"]
    config = decoder_config(checkpoint)
    stages = stages_of(config, 2)
    options = {"group": Group.single()}
    last = Decoder(config, "meta", torch.float32, stage=stages[1], **options)
    with pytest.raises(CheckpointError, match=r"model.layers.4.mlp.up_proj.weight is missing"):
        fill(last, checkpoint, device="cpu")
