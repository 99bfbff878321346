"""``save_pretrained`` of a cut model: the dense model's folder, byte by byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pyparallel.checkpoint.source import CheckpointError
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from pyparallel.models.parallelize import parallelize
from pyparallel.testing import poisoned_empty
from pyparallel.training.data import data_parallel
from tests.transformers_models import CASES, build, class_of

# transformers refuses to build it with its default attention.
ATTENTION = {"gemma2": "eager"}
SEVERAL = {"max_shard_size": "20KB"}


def original(name: str) -> nn.Module:
    model = build(name, ATTENTION.get(name, "sdpa"))
    return model.to(torch.bfloat16) if name in ("qwen3", "olmo2") else model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    for name in CASES:
        original(name).save_pretrained(path / name)
    original("llama tied").save_pretrained(path / "several", **SEVERAL)
    return path


def save_all(root: Path, out: Path, sizes: dict[str, int], names: list[str]) -> None:
    mesh = init_mesh(**sizes)
    with poisoned_empty():
        for name in names:
            parallelize(original(name), mesh).save_pretrained(out / name)
        model = parallelize(original("llama tied"), mesh)
        model.save_pretrained(out / "several", state_dict=model.state_dict(), **SEVERAL)
        # A dense state goes through as it is.
        dense = original("llama tied").state_dict()
        model.save_pretrained(out / "given", mesh.world.rank == 0, dense)
        # Ours keeps transformers' class for these.
        load(root / "cohere", mesh).model.save_pretrained(out / "loaded")
        # A dense model beside it is transformers' own business, on one rank too.
        if mesh.world.rank == 1:
            original("llama").save_pretrained(out / "alone")
        assert "num_parameters" not in vars(model)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("sizes", [{"tp": 3}, {"dp": 2, "tp": 2}])
def test_the_dense_models_folder(root: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    names = list(CASES) if sizes == {"tp": 3} else ["llama", "gpt2"]
    ranks = 3 if sizes == {"tp": 3} else 4
    launch(save_all, ranks, root, tmp_path, sizes, names, threads=1, timeout_s=240.0)
    for name in (*names, "several"):
        assert contents(tmp_path / name) == contents(root / name), name
    assert contents(tmp_path / "given") == contents(root / "llama tied")
    assert contents(tmp_path / "loaded") == contents(root / "cohere")
    # Transformers itself writes a dense model on the first rank alone.
    assert "model.safetensors" not in contents(tmp_path / "alone")
    assert len(contents(tmp_path / "several")) > 4
    class_of("llama tied").from_pretrained(tmp_path / "several")


def refused(out: Path) -> list[str]:
    mesh = init_mesh(dp=2, tp=2)
    model = parallelize(build("llama"), mesh)
    mixed = build("llama").state_dict() if mesh.world.rank == 0 else model.state_dict()
    (out / "file").touch()
    said = []

    def refuses(model: nn.Module, **options: object) -> None:
        with pytest.raises(CheckpointError) as error:
            model.save_pretrained(out / "file" / "folder", **options)
        said.append(str(error.value))

    refuses(model)
    refuses(model, state_dict=mixed)
    refuses(model, distributed_checkpoint=True)
    refuses(data_parallel(model, mesh, engine="fsdp"))
    for sizes in ({"pp": 2, "tp": 2}, {"dp": 2, "pp": 2}):
        refuses(parallelize(build("llama"), init_mesh(**sizes)))
    return said


def test_what_it_can_not_do_is_one_line_on_every_rank(tmp_path: Path) -> None:
    way = "use pyparallel.export(model, folder, mesh), or pyparallel.save(model, folder, mesh)"
    stage = f"expected a whole model, got one stage of a pipeline; {way}"
    words = (
        "save_pretrained: rank 0: NotADirectoryError",
        "state_dict: expected this rank's part of ",
        f"distributed_checkpoint: expected False, since transformers does not know these shards; {way}",
        f"FSDP has cut them too; {way}",
        stage,
        stage,
    )
    for said in launch(refused, 4, tmp_path, threads=1, timeout_s=120.0):
        for expected, line in zip(words, said, strict=True):
            assert expected in line
            assert "\n" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
