"""save and restore: what one mesh wrote, every other reads, and nothing else is let in.

The truth of a restored model is :func:`load` of the folder that the saved model came from.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.cut.shard import REPLICATED
from pyparallel.launch import launch
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load
from pyparallel.models.parallelize import parallelize
from pyparallel.saving.save import restore, save
from pyparallel.testing import assert_as_dense, assert_equal, poisoned_empty
from tests.orders import Exact, farthest
from tests.transformers_models import build

# Case, changes, dtype. Vocabulary 61 divides by nothing; 9 heads in 3 KV groups, or in 1.
OWN = {
    "llama": ("llama", {}, torch.float32),
    "tied": ("llama tied", {}, torch.float32),
    "one kv head": ("llama", {"num_key_value_heads": 1}, torch.float32),
    "qwen3 bf16": ("qwen3", {}, torch.bfloat16),
    "gpt2": ("gpt2", {}, torch.float32),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}, torch.float32),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 10}, torch.float32),
}
# Also cut as transformers models, whose projections lie in other ways.
BOTH = ("llama", "tied", "gpt2", "gpt_neox")
HF = {
    "phi3": ("phi3", {}, torch.float32),
    "bert": ("bert", {}, torch.float32),
    "gemma3 bf16": ("gemma3", {}, torch.bfloat16),
}
CASES = {**OWN, **HF}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Hugging Face models."""
    path = tmp_path_factory.mktemp("models")
    for name, (case, changes, dtype) in CASES.items():
        build(case, **changes).to(dtype).save_pretrained(path / name)
    return path


def cut(root: Path, name: str, kind: str, mesh: Mesh, **options: object) -> nn.Module:
    """The model of a case on a mesh: pyparallel's own, or the transformers model."""
    if kind == "own":
        return load(root / name, mesh, **options)
    case, changes, dtype = CASES[name]
    return parallelize(build(case, **changes).to(dtype), mesh, **options)


def poison(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def assert_same(model: nn.Module, truth: nn.Module, what: str) -> None:
    expected = dict(truth.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert_equal(local(parameter).detach(), local(expected[name]).detach(), f"{what}: {name}")


def with_state(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW whose moments are known functions of the parameters they belong to."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125, betas=(0.5, 0.25))
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": 2 * parameter.detach() + 1,
            "exp_avg_sq": parameter.detach() ** 2,
        }
    return optimizer


def assert_state(optimizer: torch.optim.Optimizer, what: str) -> None:
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"]) == (0.125, (0.5, 0.25)), what
    for parameter in group["params"]:
        held, value = optimizer.state[parameter], local(parameter).detach()
        assert held["step"].dtype == torch.float32 and held["step"] == 3, what
        assert_equal(local(held["exp_avg"]), 2 * value + 1, f"{what}: exp_avg")
        assert_equal(local(held["exp_avg_sq"]), value**2, f"{what}: exp_avg_sq")


def across_tp(root: Path, out: Path) -> None:
    two = init_mesh(dp=3, tp=2)
    others = [init_mesh(dp=2, tp=3), init_mesh(dp=6), init_mesh(tp=6)]
    kinds = [(name, "own") for name in OWN] + [(name, "hf") for name in (*BOTH, *HF)]
    with poisoned_empty():
        for name, kind in kinds:
            folder = out / f"{name} {kind}"
            model = cut(root, name, kind, two)
            save(model, folder, two, optimizer=with_state(model), extra={"tokens": [1, 2.5]})
            for mesh in others:
                # Once is enough for the tensors that only transformers' models have; 10 heads are too
                # few of GPT-NeoX's fused ones for 6 ranks to differ.
                if mesh.tp.size != 3 and (kind == "hf" or name == "gpt_neox"):
                    continue
                what = f"{name} {kind} on {mesh}"
                truth = cut(root, name, kind, mesh)
                model = poison(cut(root, name, kind, mesh))
                optimizer = torch.optim.AdamW(model.parameters())
                assert restore(model, folder, mesh, optimizer=optimizer) == {"tokens": [1, 2.5]}
                assert_same(model, truth, what)
                assert_state(optimizer, what)
        # Written by one kind of model, read by the other; with fused projections and without.
        for name in BOTH:
            for kind, other in (("own", "hf"), ("hf", "own")):
                mesh = others[0]
                model = poison(cut(root, name, other, mesh))
                optimizer = torch.optim.AdamW(model.parameters())
                restore(model, out / f"{name} {kind}", mesh, optimizer=optimizer)
                assert_same(model, cut(root, name, other, mesh), f"{name} {kind} to {other}")
                assert_state(optimizer, f"{name} {kind} to {other}")
        # load() takes what save() wrote, as it takes any folder.
        for folder in ("llama own", "gpt2 hf", "phi3 hf"):
            model, truth = (load(path, mesh) for path in (out / folder, root / folder.split()[0]))
            assert_same(model, truth, f"load {folder}")


def test_tp_2_to_3_to_1_to_6(root: Path, tmp_path: Path) -> None:
    launch(across_tp, 6, root, tmp_path, threads=1)
    for name in CASES:
        original = open_checkpoint(root / name)
        dense = {key: original.read(key, REPLICATED, 0) for key in original.shapes}
        for kind in ("own", "hf"):
            folder = tmp_path / f"{name} {kind}"
            if folder.exists():
                assert {file.suffix for file in folder.iterdir()} <= {".json", ".safetensors"}
                checkpoint = open_checkpoint(folder)
                assert checkpoint.shapes == original.shapes
                for key, value in dense.items():
                    assert_equal(checkpoint.read(key, REPLICATED, 0), value, key)
                # A copy of everything, and one only: parameters and two moments.
                stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                numbers = 3 * sum(p.numel() * p.itemsize for p in dense.values())
                assert numbers <= stored <= numbers + 200 * len(checkpoint.index.tensors) * 20


def sharded(model: nn.Module, mesh: Mesh) -> nn.Module:
    """FSDP2 over dp of what tp left, layer by layer."""
    for layer in model.layers:
        fully_shard(layer, mesh=mesh.device_mesh["dp"])
    return fully_shard(model, mesh=mesh.device_mesh["dp"])


def across_axes(root: Path, out: Path) -> None:
    square, wide = init_mesh(dp=2, tp=2), init_mesh(dp=4)
    context, pairs = init_mesh(cp=2, tp=2), init_mesh(tp=4)
    with poisoned_empty():
        for name in ("llama", "one kv head", "gpt2", "tied", "qwen3 bf16"):
            model = sharded(cut(root, name, "own", square), square)
            save(model, out / f"fsdp {name}", square, optimizer=with_state(model))
            for mesh, cut_more in ((square, False), (wide, True), (pairs, False), (square, True)):
                what = f"{name} from fsdp on {mesh}"
                model, truth = poison(cut(root, name, "own", mesh)), cut(root, name, "own", mesh)
                if cut_more:
                    model, truth = sharded(model, mesh), sharded(truth, mesh)
                optimizer = torch.optim.AdamW(model.parameters())
                restore(model, out / f"fsdp {name}", mesh, optimizer=optimizer)
                assert_same(model, truth, what)
                assert_state(optimizer, what)
        # Whole parameters that FSDP holds after a forward without a backward.
        model(torch.arange(8).view(1, 8))
        save(model, out / "gathered", square)
        restore(model, out / "gathered", square)
        assert_same(model, truth, "gathered")

        # Sequence parallelism, context parallelism and DDP change no tensor.
        model = load(root / "llama", context, sequence_parallel=True)
        save(model, out / "sp", context, optimizer=with_state(model))
        model = poison(load(root / "llama", square))
        wrapped = DistributedDataParallel(
            poison(model), process_group=square.device_mesh.get_group("dp")
        )
        optimizer = torch.optim.AdamW(wrapped.parameters())
        restore(wrapped, out / "sp", square, optimizer=optimizer)
        assert_same(model, load(root / "llama", square), "sp and cp to ddp")
        assert_state(optimizer, "sp and cp to ddp")
        save(wrapped, out / "ddp", square)
        model = poison(cut(root, "llama", "hf", square, sequence_parallel=True))
        restore(model, out / "ddp", square)
        assert_same(model, cut(root, "llama", "hf", square), "ddp to sp of transformers")
        save(model, out / "hf sp", square)
        model = poison(load(root / "llama", square))
        restore(model, out / "hf sp", square)
        assert_same(model, load(root / "llama", square), "sp of transformers to own")
        model = poison(load(root / "llama", context, sequence_parallel=True))
        restore(torch.compile(model), out / "ddp", context)
        assert_same(model, load(root / "llama", context), "ddp to sp and cp")


def test_fsdp_ddp_sp_and_cp(root: Path, tmp_path: Path) -> None:
    launch(across_axes, 4, root, tmp_path, threads=1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    # Not the padding id, of which transformers drops the gradient.
    ids = torch.arange(14).view(2, 7) * (number + 3) % 59 + 2
    logits = model(ids)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def continued(root: Path, out: Path) -> dict[str, torch.Tensor]:
    """Two steps, a checkpoint, a third step; the same from the checkpoint."""
    mesh, other = init_mesh(dp=3, tp=2), init_mesh(dp=2, tp=3)
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        options = {"momentum": 0.5} if kind is torch.optim.SGD else {}
        model = load(root / "llama", mesh)
        optimizer = kind(model.parameters(), lr=0.01, **options)
        for number in range(2):
            step(model, optimizer, number)
        folder = out / kind.__name__
        save(model, folder, mesh, optimizer=optimizer)
        step(model, optimizer, 2)
        again = poison(load(root / "llama", mesh))
        optimizer = kind(again.parameters(), lr=1.0, **options)
        restore(again, folder, mesh, optimizer=optimizer)
        step(again, optimizer, 2)
        assert_same(again, model, f"the third step of {kind.__name__}")
    moved = poison(load(root / "llama", other))
    optimizer = torch.optim.SGD(moved.parameters(), lr=1.0, momentum=0.5)
    restore(moved, folder, other, optimizer=optimizer)
    step(moved, optimizer, 2)
    save(moved, out / "third", other)
    return {}


def test_training_goes_on(root: Path, tmp_path: Path) -> None:
    """On the same mesh bit for bit; on another as the dense model."""
    launch(continued, 6, root, tmp_path, threads=1)

    def trained(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = build("llama").to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
        for number in range(3):
            step(lambda ids: model(ids).logits, optimizer, number)
        return {name: p.detach() for name, p in model.named_parameters()}

    with Exact():
        exact = trained(torch.float64)
    dense = farthest(partial(trained, torch.float32), exact)
    checkpoint = open_checkpoint(tmp_path / "third")
    for name, truth in exact.items():
        assert_as_dense(checkpoint.read(name, REPLICATED, 0), dense[name], truth, 3, name)
