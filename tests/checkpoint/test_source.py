"""Checkpoints read by slices: what each rank gets, what it costs, and what is wrong with bad ones."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pyparallel.checkpoint.source import CheckpointError, open_checkpoint
from pyparallel.cut.shard import REPLICATED, HeadLayout, even_parts, features
from pyparallel.launch import RankError, launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from tests.checkpoint.gguf_files import Model
from tests.transformers_models import build

HEADS, HEAD_DIM, HIDDEN = 6, 32, 192


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A one-layer Llama in several quantisations, and what its tensors hold after rounding."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    kinds = {
        "attn_q": "Q4_0",
        "attn_k": "F16",
        "attn_output": "Q4_1",
        "ffn_gate": "Q5_0",
        "ffn_up": "BF16",
    }
    sizes = {"hidden": HIDDEN, "heads": HEADS, "kv_heads": 3, "intermediate": 256, "layers": 1}
    return path, Model("Q8_0", **sizes, vocab=40, tied=True, kinds=kinds).write(path)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_gguf_slices(gguf_file: tuple[Path, dict[str, np.ndarray]], parts: int) -> None:
    path, rounded = gguf_file
    checkpoint = open_checkpoint(path)
    layout = HeadLayout.of(HEADS, 3, parts)
    query, cut = layout.query_sharding(HEAD_DIM), features(256, parts)
    layer = "model.layers.0."
    for name, stored, sharding in (
        ("model.embed_tokens.weight", "token_embd.weight", even_parts(40, parts)),
        ("model.norm.weight", "output_norm.weight", REPLICATED),
        (layer + "self_attn.v_proj.weight", "blk.0.attn_v.weight", layout.kv_sharding(HEAD_DIM)),
        (layer + "self_attn.o_proj.weight", "blk.0.attn_output.weight", query.along(1)),
        (layer + "mlp.gate_proj.weight", "blk.0.ffn_gate.weight", cut),
        (layer + "mlp.up_proj.weight", "blk.0.ffn_up.weight", cut),
        (layer + "mlp.down_proj.weight", "blk.0.ffn_down.weight", cut.along(1)),
    ):
        dense = torch.from_numpy(rounded[stored])
        for rank in range(parts):
            got = checkpoint.read(name, sharding, rank)
            assert torch.equal(got, sharding.split(dense, rank)), (name, rank)
            half = checkpoint.read(name, sharding, rank, dtype=torch.bfloat16)
            assert torch.equal(half, sharding.split(dense, rank).bfloat16())


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_gguf_query_and_key_rows_in_hugging_face_order(
    gguf_file: tuple[Path, dict[str, np.ndarray]], parts: int
) -> None:
    """llama.cpp stores row pairs (i, i + D/2) of each head side by side."""
    path, rounded = gguf_file
    layout = HeadLayout.of(HEADS, 3, parts)
    for name, stored, heads, sharding in (
        ("q_proj", "blk.0.attn_q.weight", HEADS, layout.query_sharding(HEAD_DIM)),
        ("k_proj", "blk.0.attn_k.weight", 3, layout.kv_sharding(HEAD_DIM)),
    ):
        dense = torch.empty(heads * HEAD_DIM, HIDDEN)
        for head in range(heads):
            for pair in range(HEAD_DIM // 2):
                for side in range(2):
                    source = rounded[stored][head * HEAD_DIM + 2 * pair + side]
                    row = head * HEAD_DIM + pair + side * HEAD_DIM // 2
                    dense[row] = torch.from_numpy(source)
        checkpoint = open_checkpoint(path)
        for rank in range(parts):
            got = checkpoint.read(f"model.layers.0.self_attn.{name}.weight", sharding, rank)
            assert torch.equal(got, sharding.split(dense, rank))


def test_an_opened_gguf_is_small_and_picklable(gguf_file: tuple[Path, dict]) -> None:
    checkpoint = open_checkpoint(gguf_file[0])
    copy = pickle.loads(pickle.dumps(checkpoint))
    assert copy.shapes == checkpoint.shapes
    assert checkpoint.config()["vocab_size"] == 40
    assert checkpoint.config()["tied"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in several files with an index."""
    path = tmp_path_factory.mktemp("sharded")
    build("llama").save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def test_sharded_index_equals_one_file(folder: Path, tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    several, one = open_checkpoint(folder), open_checkpoint(tmp_path)
    assert several.shapes == one.shapes
    for name, value in model.state_dict().items():
        for sharding in (REPLICATED, even_parts(value.shape[0], 3)):
            for rank in range(3):
                expected = sharding.split(value, rank)
                assert torch.equal(several.read(name, sharding, rank), expected)
                assert torch.equal(one.read(name, sharding, rank), expected)


def copy_with(folder: Path, target: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """The folder's model in one file, with tensors replaced, added or (None) left out."""
    checkpoint = open_checkpoint(folder)
    tensors = {name: checkpoint.read(name, REPLICATED, 0) for name in checkpoint.shapes}
    tensors |= change
    save_file({k: v for k, v in tensors.items() if v is not None}, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def load_only(path: str) -> None:
    load(path, init_mesh(tp=torch.distributed.get_world_size()))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "model.layers.1.mlp.up_proj.weight is missing"),
        ("model.layers.7.extra", torch.ones(3), "model.layers.7.extra is not one of a llama"),
        (
            "model.norm.weight",
            torch.ones(35),
            "model.norm.weight of shape (35,) does not give this model's (36,)",
        ),
        (
            "lm_head.weight",
            torch.ones(60, 36),
            "lm_head.weight of shape (60, 36) should have length 61",
        ),
    ],
)
def test_a_wrong_tensor_is_named(
    folder: Path, tmp_path: Path, name: str, value: torch.Tensor | None, words: str
) -> None:
    path = copy_with(folder, tmp_path, {name: value})
    with pytest.raises(RankError) as failure:
        launch(load_only, 2, str(path), threads=1)
    assert isinstance(failure.value.__cause__, CheckpointError)
    assert words in str(failure.value.__cause__)


def bad_inputs(folder: Path, gguf_path: Path, root: Path) -> list[tuple[Path, str]]:
    """Paths, and what the error says of each."""
    tensors = next(folder.glob("*.safetensors")).read_bytes()
    for name in ("cut", "garbage", "pickled", "empty", "indexed", "two"):
        (root / name).mkdir()
    (root / "cut/model.safetensors").write_bytes(tensors[: len(tensors) // 2])
    (root / "garbage/model.safetensors").write_bytes(b"not tensors at all")
    (root / "pickled/pytorch_model.bin").write_bytes(b"")
    index = {"weight_map": {"a": "absent.safetensors"}}
    (root / "indexed/model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"b": torch.ones(1)}, root / "indexed/present.safetensors")
    for name in ("one.gguf", "other.gguf"):
        (root / "two" / name).write_bytes(b"")
    whole = gguf_path.read_bytes()
    (root / "header.gguf").write_bytes(whole[:300])
    (root / "data.gguf").write_bytes(whole[: len(whole) * 2 // 3])
    (root / "text.gguf").write_bytes(b"hello")
    (root / "notes.txt").write_text("hello")
    return [
        (root / "nowhere", "no such file or folder"),
        (root / "cut", "not a whole safetensors file"),
        (root / "garbage", "not a whole safetensors file"),
        (root / "pickled", "convert them to safetensors"),
        (root / "empty", "no *.safetensors or *.gguf file in it"),
        (root / "indexed", "absent.safetensors: no such file"),
        (root / "two", "name one of one.gguf, other.gguf"),
        (root / "header.gguf", "not a whole GGUF file"),
        (root / "data.gguf", "not a whole GGUF file"),
        (root / "text.gguf", "not a whole GGUF file"),
        (root / "notes.txt", "expected a folder, a .safetensors or a .gguf file"),
    ]


def test_bad_files(folder: Path, gguf_file: tuple[Path, dict], tmp_path: Path) -> None:
    for path, words in bad_inputs(folder, gguf_file[0], tmp_path):
        with pytest.raises(CheckpointError) as failure:
            open_checkpoint(path)
        assert words in str(failure.value), path
        assert "\n" not in str(failure.value), path


def test_unknown_gguf_architecture(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(RankError) as failure:
        launch(load_only, 1, str(path), threads=1)
    assert "got 'mamba'" in str(failure.value.__cause__)


def peak_of(
    tiny: Path, big: Path, weights: str | None = None, transformers: bool = False
) -> tuple[int, int, int]:
    """Peak memory before and after loading, and this rank's weights, in bytes."""
    mesh = init_mesh(tp=torch.distributed.get_world_size())
    # What the loading code itself takes is not the weights'.
    load(tiny, mesh, weights=weights, transformers=transformers)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _peak()
    model = load(big, mesh, weights=weights, transformers=transformers)
    share = sum(p.numel() * p.itemsize for p in model.parameters())
    return before, _peak(), share


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.parametrize(("ranks", "transformers"), [(1, False), (3, False), (3, True)])
def test_peak_memory_is_the_share_and_one_tensor(
    tmp_path: Path, ranks: int, transformers: bool
) -> None:
    """A 105 MB model whose largest tensor is 8 MB; 6 MB are left to the allocator."""
    build("llama").save_pretrained(tmp_path / "tiny")
    sizes = {"hidden_size": 576, "intermediate_size": 2048, "vocab_size": 3640, "head_dim": 64}
    build("llama", num_hidden_layers=5, **sizes).save_pretrained(tmp_path / "big")
    largest = 3640 * 576 * 4
    folders = tmp_path / "tiny", tmp_path / "big"
    for before, after, share in launch(peak_of, ranks, *folders, None, transformers, threads=1):
        assert after - before <= share + largest + 6e6
        assert after - before >= 0.9 * share


@pytest.mark.parametrize("ranks", [1, 3])
def test_peak_memory_with_blocks_is_the_blocks(tmp_path: Path, ranks: int) -> None:
    """A model of 100 MB in fp32 and 15.7 MB in blocks, whose largest tensor is 2.6 MB."""
    tiny, big = tmp_path / "tiny.gguf", tmp_path / "big.gguf"
    Model("Q4_1", hidden=64, heads=3, kv_heads=3, intermediate=96).write(tiny)
    sizes = {"hidden": 1024, "heads": 32, "kv_heads": 32, "intermediate": 2048, "vocab": 4000}
    Model("Q4_1", **sizes, tied=True).write(big)
    for before, after, share in launch(peak_of, ranks, tiny, big, "blocks", threads=1):
        assert share < 16e6
        assert after - before <= share + 2.6e6 + 6e6
        assert after - before >= 0.9 * share
