"""pyparallel train: the losses of the dense model, step by step; its text; its mistakes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.cli import main
from pyparallel.commands.corpus import token_rows
from pyparallel.commands.train import Run, batch_of, train
from pyparallel.mesh import AXES
from pyparallel.training.learning_rate import learning_rate
from tests.transformers_models import build

STEPS, BATCH, LR, MAX_NORM = 5, 4, 1e-3, 0.5
SCHEDULED = {"warmup": 2, "lr_schedule": "cosine"}


def rows() -> Tensor:
    return torch.randint(2, 60, (6, 9), generator=torch.Generator().manual_seed(3))


def dense_model() -> torch.nn.Module:
    return build("llama tied", num_hidden_layers=4)


@cache
def dense_losses(dtype: torch.dtype, warmup: int, schedule: str) -> list[float]:
    model = dense_model().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = batch_of(rows(), step, BATCH)
        rate = learning_rate(LR, step, steps=STEPS, warmup=warmup, schedule=schedule)
        optimizer.param_groups[0]["lr"] = rate
        logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((2, 2, 1, 2), {"micro_batches": 2}),
        ((2, 1, 1, 1), {"engine": "fsdp", "recompute": "layers"}),
        ((1, 2, 1, 1), {"schedule": "interleaved", "chunks": 2, "micro_batches": 2}),
        # Both axes are test_mesh_training.py's too.
        pytest.param(
            (1, 1, 2, 2),
            {"sequence_parallel": True, **SCHEDULED, "accumulate": 2},
            marks=pytest.mark.slow,
        ),
        ((1, 1, 1, 3), {"shares": (5, 3, 1)}),
    ],
)
def test_the_losses_are_the_dense_models(tmp_path: Path, sizes: tuple, options: dict) -> None:
    dense_model().save_pretrained(tmp_path)
    rates = options.get("warmup", 0), options.get("lr_schedule", "constant")
    exact, rounded = (dense_losses(dtype, *rates) for dtype in (torch.float64, torch.float32))
    # A step is as many sequences, however they are cut.
    batch = BATCH // options.get("accumulate", 1)
    asked = Run(dict(zip(AXES, sizes, strict=True)), STEPS, batch, LR, max_norm=MAX_NORM, **options)
    seen = []
    told = train(
        open_checkpoint(tmp_path), asked, rows(), threads=1, on_step=lambda *s: seen.append(s)
    )
    # What fp32 does to the dense curve; another order of sums may do it a few times over.
    rounding = max(abs(a - b) for a, b in zip(rounded, exact, strict=True))
    assert exact[0] - exact[-1] > 1e4 * rounding
    for loss, truth in zip(told["losses"], exact, strict=True):
        assert abs(loss - truth) <= 10 * rounding + 2.0**-22 * truth
    assert [step for step, _, _ in seen] == list(range(STEPS))
    assert [loss for _, loss, _ in seen] == told["losses"]
    assert len(told["ranks"]) == asked.world_size
    assert all(rank["weight_bytes"] > 0 for rank in told["ranks"])


class Letters:
    """A tokenizer that makes a token of each letter."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_text_becomes_rows(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text("cdef")
    (tmp_path / "a.py").write_text("ab")
    (tmp_path / "c.txt").write_text("not read from a folder")
    assert token_rows(Letters(), tmp_path, 2, 3).tolist() == [[97, 98, 99], [100, 101, 102]]
    assert token_rows(Letters(), tmp_path / "c.txt", 1, 3).tolist() == [[110, 111, 116]]
    with pytest.raises(ValueError, match="at least 3 rows of 3 tokens, got 6 tokens"):
        token_rows(Letters(), tmp_path, 3, 3)
    with pytest.raises(ValueError, match=r"text: expected a file or a folder, got .*missing"):
        token_rows(Letters(), tmp_path / "missing", 1, 1)


def test_batches_go_round() -> None:
    numbers = torch.arange(5).unsqueeze(1)
    found = [batch_of(numbers, step, 2).flatten().tolist() for step in range(3)]
    assert found == [[0, 1], [2, 3], [4, 0]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dp", "3"], "--batch: expected a multiple of --dp 3, got 4; use 6"),
        (["--pp", "0"], "--pp: expected at least 1, got 0"),
        (["--tp", "2", "--shares", "2,0"], "--shares of rank 1: expected at least 1, got 0"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--warmup", "-1"], "--warmup: expected at least 0, got -1"),
        (["--accumulate", "0"], "--accumulate: expected at least 1, got 0"),
        (["--save-every", "5"], "--save-every: expected --out, the folder of the checkpoints"),
        (["--resume"], "--resume: expected --out, the folder of the checkpoints"),
        (["--eval-text", "x"], "--eval-text: expected --eval-every, how often it is looked at"),
        ([], "nowhere: no such file or folder"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--model", "nowhere", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
