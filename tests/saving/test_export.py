"""export: the folder that a cut model, or a checkpoint, becomes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from pyparallel.checkpoint.source import CheckpointError, open_checkpoint
from pyparallel.cli import main
from pyparallel.cut.shard import REPLICATED
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.config import from_hugging_face
from pyparallel.models.decoder import Decoder
from pyparallel.models.load import load
from pyparallel.models.parallelize import parallelize
from pyparallel.saving.export import export, export_checkpoint
from pyparallel.saving.save import save
from pyparallel.testing import poisoned_empty
from tests.checkpoint.test_source import gguf_file  # noqa: F401  (a fixture)
from tests.transformers_models import CASES, build, class_of

# Those that become a Decoder when they are loaded.
OWN = ("llama", "llama tied", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")
# transformers refuses to build it with its default attention.
ATTENTION = {"gemma2": "eager"}


def original(name: str) -> nn.Module:
    model = build(name, ATTENTION.get(name, "sdpa"))
    return model.to(torch.bfloat16) if name in ("qwen3", "olmo2") else model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("originals")
    for name in CASES:
        original(name).save_pretrained(path / name)
    (path / "llama/tokenizer.json").write_text('{"model": {}}')
    return path


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


def assert_bit_equal(found: Path, expected: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        assert torch.equal(ours[name].view(torch.uint8), value.view(torch.uint8)), name


def export_all(root: Path, out: Path) -> None:
    three = init_mesh(tp=3)
    with poisoned_empty():
        for name in CASES:
            if name in OWN:
                export(load(root / name, three), out / f"own {name}", three)
            export(parallelize(original(name), three), out / f"hf {name}", three)
        model = load(root / "llama", three)
        export(model, out / "several", three, max_file_bytes=20_000)
        export(model, out / "half", three, dtype=torch.float16)


def test_every_family_bit_equal_to_save_pretrained(root: Path, tmp_path: Path) -> None:
    launch(export_all, 3, root, tmp_path, threads=1)
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()
    for folder in tmp_path.iterdir():
        kind, _, name = folder.name.partition(" ")
        if kind in ("own", "hf"):
            assert_bit_equal(folder, root / name)
            ours = json.loads((folder / "config.json").read_text())
            theirs = json.loads((root / name / "config.json").read_text())
            assert ours == theirs, name
            assert class_of(name).from_pretrained(folder) is not None
    assert (tmp_path / "own llama/tokenizer.json").read_text() == '{"model": {}}'
    # Several files and their index, and another dtype.
    several = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert several == [f"model-{i:05}-of-00006.safetensors" for i in range(1, 7)]
    assert_bit_equal(tmp_path / "several", root / "llama")
    class_of("llama").from_pretrained(tmp_path / "several")
    config = json.loads((tmp_path / "half/config.json").read_text())
    assert config["dtype"] == "float16"
    for name, value in tensors_of(root / "llama").items():
        assert torch.equal(tensors_of(tmp_path / "half")[name], value.half())


def test_several_files_and_their_index(tmp_path: Path) -> None:
    """The index is transformers', but for which file a tensor is in; no file is above the limit."""
    model = build("llama", num_hidden_layers=11)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    export_checkpoint(
        open_checkpoint(tmp_path / "theirs"), tmp_path / "ours", max_file_bytes=20_000
    )
    index = "model.safetensors.index.json"
    ours, theirs = (json.loads((tmp_path / who / index).read_text()) for who in ("ours", "theirs"))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert_bit_equal(tmp_path / "ours", tmp_path / "theirs")
    for file in (tmp_path / "ours").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            held = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118
            assert sum(t.nbytes for t in held) <= 20_000
            assert all(t.data_ptr() % t.itemsize == 0 for t in held)
            assert all(ours["weight_map"][name] == file.name for name in tensors.keys())  # noqa: SIM118
    assert len({*ours["weight_map"].values()}) > 11


def export_gguf(path: Path, out: Path) -> None:
    mesh = init_mesh(tp=2)
    export(load(path, mesh), out / "cut", mesh)
    save(load(path, mesh), out / "saved", mesh)


def test_gguf(gguf_file: tuple[Path, dict], tmp_path: Path) -> None:  # noqa: F811
    """The dequantised tensors; transformers reads what the cut model and the file itself become."""
    launch(export_gguf, 2, gguf_file[0], tmp_path, threads=1)
    assert main(["export", "--checkpoint", str(gguf_file[0]), "--out", str(tmp_path / "own")]) == 0
    checkpoint = open_checkpoint(gguf_file[0])
    saved = tmp_path / "saved"
    assert main(["export", "--checkpoint", str(saved), "--out", str(tmp_path / "later")]) == 0
    for folder in (tmp_path / "cut", tmp_path / "own", tmp_path / "later"):
        found = tensors_of(folder)
        assert found.keys() == checkpoint.shapes.keys()
        for name, value in found.items():
            assert torch.equal(value, checkpoint.read(name, REPLICATED, 0)), name
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.num_key_value_heads == 3
        assert torch.equal(model.model.norm.weight, found["model.norm.weight"])


def test_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "--checkpoint", str(root / "gpt2"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--dtype", "bfloat16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == ["model.safetensors"]
    assert report["tensors"] == len(tensors_of(root / "gpt2"))
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert_bit_equal(tmp_path / "out", root / "gpt2")
    assert not list(tmp_path.glob(".*"))


def unknown_source(out: Path) -> list[str]:
    mesh = init_mesh(tp=2)
    config = from_hugging_face(build("llama").config.to_dict())
    model = Decoder(config, group=mesh.tp)
    errors = []
    for options in ({}, {"source": out / "nowhere"}):
        with pytest.raises(CheckpointError) as failure:
            export(model, out / "folder", mesh, **options)
        errors.append(str(failure.value))
    return errors


def test_a_model_from_nowhere_has_no_config(tmp_path: Path) -> None:
    for errors in launch(unknown_source, 2, tmp_path, threads=1):
        assert "config.json is not known; give source=" in errors[0]
        assert "nowhere: no such file or folder" in errors[1]
    assert not list(tmp_path.iterdir())
