"""Which files of a folder are read, and that no name, link or device leads elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyparallel.checkpoint import choice as checkpoint_choice
from pyparallel.checkpoint.choice import read_generation_config
from pyparallel.checkpoint.source import CheckpointError, SafetensorsCheckpoint, open_checkpoint
from pyparallel.cut.shard import REPLICATED
from tests.checkpoint.somebody_else import as_somebody_else, is_root
from tests.transformers_models import build

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in one file."""
    path = tmp_path_factory.mktemp("whole")
    build("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several files with an index."""
    path = tmp_path_factory.mktemp("several")
    build("llama").save_pretrained(path, max_shard_size="40KB")
    return path


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def shifted(folder: Path, name: str, by: float = 1.0) -> None:
    """A file of every tensor of a folder, each changed."""
    tensors = {
        k: v + by for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()
    }
    save_file(tensors, folder / name, {"format": "pt"})


def norm_of(path: Path) -> float:
    return open_checkpoint(path).read(NORM, REPLICATED, 0)[0].item()


def refused(path: Path) -> str:
    begin = time.monotonic()
    with pytest.raises(CheckpointError) as failure:
        open_checkpoint(path).config()
    assert time.monotonic() - begin < 60
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_one_file_wins_over_an_index(whole: Path, several: Path, tmp_path: Path) -> None:
    """As transformers: the index beside model.safetensors is stale."""
    folder = copy(several, tmp_path)
    shifted(folder, "model.safetensors")
    assert norm_of(folder) == norm_of(whole) + 1


def test_files_that_nothing_names_are_left_out_and_named_once(whole: Path, tmp_path: Path) -> None:
    """Without a word before: every *.safetensors was merged, and the last name won."""
    folder = copy(whole, tmp_path)
    shifted(folder, "model_ema.safetensors")
    save_file({"base_model.lora_A": torch.ones(2)}, folder / "adapter_model.safetensors")
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    with pytest.warns(UserWarning) as caught:
        assert norm_of(folder) == norm_of(whole)
    (words,) = [str(each.message) for each in caught]
    assert "reads model.safetensors; left out: adapter_model.safetensors, consolidated." in words
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert norm_of(folder) == norm_of(whole)
    # A folder of such files alone is none that transformers would read.
    (folder / "model.safetensors").unlink()
    assert "expected model.safetensors or model.safetensors.index.json" in refused(folder)


def test_a_tensor_is_read_from_the_file_that_the_index_names(several: Path, tmp_path: Path) -> None:
    """transformers 5.24 takes the last file's copy."""
    folder = copy(several, tmp_path)
    weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for other in set(weights.values()) - {weights[NORM]}:
        tensors = load_file(folder / other) | {NORM: torch.full((36,), 99.0)}
        save_file(tensors, folder / other, {"format": "pt"})
    assert norm_of(folder) == norm_of(several)
    # And where that file lacks it, another one is not asked.
    tensors = load_file(folder / weights[NORM])
    tensors.pop(NORM)
    save_file(tensors, folder / weights[NORM])
    assert f"tensor {NORM} of the index is not in {weights[NORM]}" in refused(folder)


def test_transformers_weights_of_the_config(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    shifted(folder, "model_ema.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for name, words in (
        ("../x.safetensors", "without '..'"),
        ("pytorch_model.bin", "expected a name that ends in"),
        (5, "transformers_weights: expected a string"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        assert words in refused(folder)
    config["transformers_weights"] = "model_ema.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    assert norm_of(folder) == norm_of(whole) + 1


def indexed(folder: Path, weights: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_no_name_leads_outside(whole: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret" / "model.safetensors"
    secret.parent.mkdir()
    shutil.copy(whole / "model.safetensors", secret)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.safetensors").symlink_to(secret)
    (folder / "sub").symlink_to(secret.parent)
    for name in (str(secret), "../secret/model.safetensors", "x/../../secret/model.safetensors"):
        assert "expected a name inside" in refused(indexed(folder, {NORM: name}))
    for name in ("", ".", "a\0b", "/", ".."):
        assert "expected a name inside" in refused(indexed(folder, {NORM: name}))
    for name in ("link.safetensors", "sub/model.safetensors"):
        assert "a link to" in refused(indexed(folder, {NORM: name}))
    for weights in ({}, [], None, 3, {NORM: 5}, {NORM: None}):
        assert "weight_map: expected" in refused(indexed(folder, weights))


def test_the_layouts_of_the_hubs_cache_are_read(several: Path, tmp_path: Path) -> None:
    """Links from snapshots/<rev> to blobs, from a subfolder there, and from a folder of a user's."""
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    for name in ("snapshots/1234", "elsewhere"):
        folder = cache / name if "/" in name else tmp_path / name
        folder.mkdir(parents=True)
        for number, file in enumerate(sorted(several.iterdir())):
            blob = cache / "blobs" / f"{number:064x}"
            shutil.copy(file, blob)
            target = f"../../blobs/{blob.name}" if "/" in name else blob
            (folder / file.name).symlink_to(target)
        assert norm_of(folder) == norm_of(several)
        linked = tmp_path / f"linked {folder.name}"
        linked.symlink_to(folder)
        assert norm_of(linked) == norm_of(several)
    # A user's own link from a name that no file gives.
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in several.iterdir():
        (mine / file.name).symlink_to(file)
    assert "a link to" in refused(mine)
    own = tmp_path / "own"
    own.mkdir()
    shifted(shutil.copytree(several, tmp_path / "other"), "whole.safetensors")
    (own / "model.safetensors").symlink_to(tmp_path / "other" / "whole.safetensors")
    assert norm_of(own) == norm_of(several) + 1


SPECIAL = ("config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json")
SPECIAL_ALONE = ("model.safetensors.index.json", "pyparallel.index.json", "model.gguf")


@pytest.mark.parametrize("name", [*SPECIAL, *SPECIAL_ALONE])
def test_only_regular_files_are_opened(whole: Path, tmp_path: Path, name: str) -> None:
    """A fifo was waited for, and config.json on a device that never ends took the memory."""
    folder = copy(whole, tmp_path)
    if name in SPECIAL_ALONE:
        (folder / "model.safetensors").unlink()
    for make, words in (
        (os.mkfifo, "a fifo"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (bind, "a socket"),
        (Path.mkdir, "a folder"),
    ):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        path = folder / name if name.endswith("gguf") and words != "a folder" else folder
        found = refused(path) if name != "tokenizer_config.json" else tokenizer_refused(folder)
        expected = f"expected a regular file, got {words}"
        if not (name.endswith("gguf") and words == "a folder"):
            assert expected in found, (name, found)
    (folder / name).rmdir()


def tokenizer_refused(folder: Path) -> str:
    from pyparallel.models.dense import load_tokenizer

    with pytest.raises(CheckpointError) as failure:
        load_tokenizer(str(folder))
    return str(failure.value)


def bind(path: Path) -> None:
    """A socket's name; the path of a socket is short."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


def test_json_is_of_a_bounded_size(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    for name in ("config.json", "generation_config.json"):
        kept = (folder / name).read_bytes()
        with open(folder / name, "wb") as file:
            file.truncate(1 << 33)
        assert "expected at most 16777216 bytes of JSON, got 8589934592" in refused(folder)
        for text, words in (
            (b"[" * 100000, "not readable as JSON"),
            (b'{"a": ' * 100000, "not readable as JSON"),
            (b"{" + b'"\xff": 1}', "not readable as JSON"),
            (b'{"a": ' + b"9" * 5000 + b"}", "not readable as JSON"),
            (b"[]", "expected a JSON object, got list"),
            (b"", "not readable as JSON"),
        ):
            (folder / name).write_bytes(text)
            assert words in refused(folder), text[:10]
        (folder / name).write_bytes(kept)


def test_permission_denied_is_not_no_such_file(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    folder.chmod(0o755)
    (folder / "model.safetensors").chmod(0o600 if is_root() else 0)
    imports = (
        "from pathlib import Path\n"
        "from pyparallel.checkpoint.source import CheckpointError, open_checkpoint"
    )
    code = (
        "try: open_checkpoint(Path(sys.argv[1]).parent).shapes\n"
        "except CheckpointError as error: print(error)"
    )
    (told,) = as_somebody_else(imports, code, folder / "model.safetensors")
    assert "permission denied" in told and "model.safetensors" in told


def test_config_and_generation_config_have_their_types(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    written = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"model_type": ["llama"]}, "model_type: expected a string"),
        ({"architectures": "Llama"}, "architectures: expected a list of strings"),
        ({"dtype": 5}, "dtype: expected a string"),
        # Of any model, those that transformers runs too.
        ({"model_type": "olmo2", "rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number"),
        ({"text_config": {"layer_norm_epsilon": -1e-5}}, "layer_norm_epsilon: expected a number"),
        ({"rope_parameters": {"a": {"rope_theta": -5}}}, "rope_theta: expected a number"),
        ({"a": json.loads('{"a": ' * 300 + "1" + "}" * 300)}, "at most 32 objects in one another"),
        ({"logit_scale": float("nan")}, "logit_scale: expected a number, got nan"),
        ({"quantization_config": {"quant_method": "gptq"}}, "got method 'gptq'"),
    ):
        (folder / "config.json").write_text(json.dumps({**written, **change}))
        assert words in refused(folder)
    (folder / "config.json").write_text(json.dumps(written))
    for change, words in (
        ({"eos_token_id": "2"}, "eos_token_id: expected an integer or a list"),
        ({"top_k": 2.5}, "top_k: expected an integer"),
        ({"temperature": float("nan")}, "temperature: expected a number"),
        ({"repetition_penalty": -1}, "repetition_penalty: expected a number"),
    ):
        (folder / "generation_config.json").write_text(json.dumps(change))
        assert words in refused(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert read_generation_config(folder) == {"eos_token_id": [1, 2]}
    assert isinstance(open_checkpoint(folder), SafetensorsCheckpoint)


def test_left_out_files_are_told_by_one_rank(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(whole, tmp_path)
    shifted(folder, "model_ema.safetensors")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(checkpoint_choice, "_told", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(folder)
