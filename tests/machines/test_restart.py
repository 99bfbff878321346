"""A run whose rank was killed goes on from its last checkpoint, with the losses of an unbroken run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import tokenizers
import torch

from pyparallel.cli import main
from pyparallel.commands.train_files import step_folder
from tests.machines.hosts import Hosts, inside
from tests.machines.waiting import wait_for
from tests.transformers_models import build

STEPS, SAVED, KILLED_AFTER = 80, 5, 10


def model_in(folder: Path) -> Path:
    """A small model, a tokenizer of words, and a text of them."""
    build("llama tied").save_pretrained(folder)
    words = {"[UNK]": 0, **{f"w{number}": number for number in range(1, 61)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    drawn = torch.randint(1, 61, (500,), generator=torch.Generator().manual_seed(5)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{number}" for number in drawn))
    return folder


def words_of(model: Path, out: Path) -> list[str]:
    said: dict[str, Any] = {
        "--model": model,
        "--text": model / "text.txt",
        "--steps": STEPS,
        "--length": 8,
        "--tp": 3,
        "--save-every": SAVED,
        "--out": out,
        "--threads": 1,
    }
    return ["train", *(str(word) for pair in said.items() for word in pair), "--json"]


def ranks_of(hosts: Hosts, host: int) -> list[int]:
    """The processes of torchrun's ranks on a host."""
    processes = [psutil.Process(number) for number in inside(hosts.names[host])]
    return [p.pid for p in processes if "torch.distributed.run" not in p.cmdline()]


@pytest.mark.slow
def test_torchrun_goes_on_from_the_last_checkpoint(
    hosts: Hosts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Else ranks of one start read in the agents' store what those of an earlier one wrote.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    model, out = model_in(tmp_path / "model"), tmp_path / "out"
    words = [*words_of(model, out), "--resume"]
    started = hosts.torchrun([2, 1], "pyparallel", *words, options=["--max-restarts", "1"])
    wait_for((step_folder(out, KILLED_AFTER) / "pyparallel.index.json").exists, 120)
    for rank in ranks_of(hosts, 1):
        os.kill(rank, signal.SIGKILL)
    outputs = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    told = next(line for line in reversed(outputs[0].splitlines()) if line.startswith("{"))
    resumed = json.loads(told)
    assert KILLED_AFTER <= resumed["first_step"] < STEPS, resumed
    assert main(words_of(model, tmp_path / "unbroken")) == 0
    whole = json.loads(capsys.readouterr().out)
    assert resumed["losses"] == whole["losses"][resumed["first_step"] :]
