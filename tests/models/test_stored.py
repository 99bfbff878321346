"""Tied weights and dtypes as the tensors say, held against transformers on the same folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from tests.transformers_models import build

IDS = torch.tensor([[3, 7, 11, 2, 9, 5, 8, 8, 1]])
FAMILIES = {
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
    # Run by transformers.
    "granite": ("model.embed_tokens.weight", "lm_head.weight"),
    "olmo2": ("model.embed_tokens.weight", "lm_head.weight"),
}


def rewrite(
    folder: Path, tensors: dict[str, Tensor | None], config: dict[str, Any] | None = None
) -> Path:
    """Replace, add or (None) remove tensors of a folder, and keys of its config."""
    file = folder / "model.safetensors"
    held = {name: value.clone() for name, value in load_file(file).items()} | tensors
    save_file({k: v for k, v in held.items() if v is not None}, file, {"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | (config or {})
    kept = {key: value for key, value in values.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def facts_of(folders: list[Path]) -> list[tuple[Tensor, torch.dtype]]:
    mesh = init_mesh(tp=torch.distributed.get_world_size())
    found = []
    with torch.no_grad():
        for folder in folders:
            model = load(folder, mesh)
            inner = getattr(model, "model", model)
            made = inner(IDS)
            logits = getattr(made, "logits", made)
            found.append((logits.float(), next(model.parameters()).dtype))
    return found


def check(folders: list[Path], *, ranks: int = 2, tolerance: float = 2e-5) -> None:
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    found = launch(facts_of, ranks, folders, threads=1)[0]
    for folder, (logits, dtype) in zip(folders, found, strict=True):
        dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        with torch.no_grad():
            want = dense(IDS).logits.float()
        assert dtype == dense.dtype, folder.name
        assert (logits - want).abs().max() <= tolerance * want.abs().max(), folder.name


def test_tied_flag_and_what_is_stored(tmp_path: Path) -> None:
    """Both and different: both are kept. Both and equal: tied. Only the head: it is both."""
    folders = []
    for family, (embedding, head) in FAMILIES.items():
        for kind in ("different", "equal", "head only", "embedding only"):
            folder = tmp_path / f"{family} {kind}"
            build(family, tie_word_embeddings=True).save_pretrained(folder)
            value = load_file(folder / "model.safetensors")[embedding].clone()
            other = torch.flip(value, (0,)).contiguous()
            change: dict[str, Tensor | None] = {
                "different": {head: other},
                "equal": {head: value},
                "head only": {embedding: None, head: value},
                "embedding only": {},
            }[kind]
            folders.append(rewrite(folder, change))
    check(folders)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_dtype_of_the_tensors_where_the_config_names_none(tmp_path: Path, family: str) -> None:
    """A config's dtype comes first, then its torch_dtype, then the first tensor of floats."""
    none = {"dtype": "absent", "torch_dtype": "absent"}
    folders = []
    for name, dtype, config in (
        ("bf16", torch.bfloat16, none),
        ("f16", torch.float16, {**none, "dtype": None}),
        ("f32", torch.float32, none),
        ("old key", torch.bfloat16, {**none, "torch_dtype": "float32"}),
        ("both keys", torch.float32, {"dtype": "bfloat16", "torch_dtype": "float16"}),
    ):
        build(family).to(dtype).save_pretrained(tmp_path / name)
        folders.append(rewrite(tmp_path / name, {}, config))
    # An index that names another dtype than its tensors'.
    build(family).bfloat16().save_pretrained(tmp_path / "index", max_shard_size="40KB")
    index = tmp_path / "index" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["dtype"] = "float32"
    index.write_text(json.dumps(content))
    config = json.loads((tmp_path / "index" / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "index" / "config.json").write_text(json.dumps(config))
    folders.append(tmp_path / "index")
    # bf16 and fp16 round at other places than the dense model's kernels.
    check(folders, ranks=1, tolerance=0.08)
    with pytest.raises(ValueError, match="dtype of its config or index: expected one of float32"):
        load_failing(rewrite(tmp_path / "bf16", {}, {"dtype": "int8"}))


def load_failing(folder: Path) -> None:
    from pyparallel.checkpoint.source import open_checkpoint
    from pyparallel.models.load import stored_dtype

    stored_dtype(open_checkpoint(folder))


def test_weights_that_are_no_floats_are_named(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, {"model.norm.weight": torch.ones(36, dtype=torch.int64)})
    with pytest.raises(Exception, match=r"model\.norm\.weight holds torch\.int64, expected floats"):
        launch(facts_of, 1, [tmp_path], threads=1)
