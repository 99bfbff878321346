"""A checkpoint knows no shares: what unequal ranks wrote equal ones read, bit for bit, and back."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.cut.shard import REPLICATED
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from pyparallel.models.parallelize import parallelize
from pyparallel.saving.save import restore, save
from pyparallel.testing import assert_equal, poisoned_empty
from tests.saving.test_sharded_checkpoint import assert_same, assert_state, poison, with_state
from tests.transformers_models import build

# Its three KV heads are fewer than four ranks; tied; transposed weights, and 6 heads.
NAMES = {"llama": {}, "one kv head": {"num_key_value_heads": 1}, "llama tied": {}, "gpt2": {}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, changes in NAMES.items():
        build("llama" if changes else name, **changes).save_pretrained(path / name)
    return path


def there_and_back(root: Path, out: Path) -> None:
    # All ranks of tp and, with the second, two replicas of two; the first writes.
    meshes = [
        init_mesh(tp=4, shares=(5, 3, 1, 2)),
        init_mesh(tp=4),
        init_mesh(dp=2, tp=2, shares=(3, 1)),
        init_mesh(tp=4, shares=(1, 1, 1, 7)),
        init_mesh(tp=4, shares=(5, 3, 1, 2)),
    ]
    with poisoned_empty():
        for name in NAMES:
            model = load(root / name, meshes[0])
            optimizer = with_state(model)
            for step, (here, there) in enumerate(itertools.pairwise(meshes)):
                what, folder = f"{name} from {here} to {there}", out / f"{name} {step}"
                save(model, folder, here, optimizer=optimizer)
                model = poison(load(root / name, there))
                optimizer = torch.optim.AdamW(model.parameters())
                restore(model, folder, there, optimizer=optimizer)
                assert_same(model, load(root / name, there), what)
                assert_state(optimizer, what)
        # The cut of transformers' own modules, whose projections lie in another way.
        model = parallelize(build("llama"), meshes[0])
        save(model, out / "parallelized", meshes[0])
        model = poison(load(root / "llama", meshes[1]))
        restore(model, out / "parallelized", meshes[1])
        assert_same(model, load(root / "llama", meshes[1]), "parallelized to own")


def test_unequal_to_equal_and_back(root: Path, tmp_path: Path) -> None:
    launch(there_and_back, 4, root, tmp_path, threads=1)
    # What is on disk is the dense model.
    for name in NAMES:
        original, written = (open_checkpoint(p) for p in (root / name, tmp_path / f"{name} 0"))
        assert written.shapes == original.shapes
        for key in original.shapes:
            pair = (checkpoint.read(key, REPLICATED, 0) for checkpoint in (written, original))
            assert_equal(*pair, f"{name} {key}")
