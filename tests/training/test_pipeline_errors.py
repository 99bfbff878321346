"""A pipelined step whose stage dies, and what is refused: one line each, in bounded time."""

from __future__ import annotations

import os
import re
import time
from typing import Any

import pytest
import torch

from pyparallel.comm.communicator import PeerError
from pyparallel.launch import RankError, launch, report
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load, load_stages
from pyparallel.training.pipeline import Pipeline
from tests.training.pipeline_checks import LAYERS, batch_of
from tests.transformers_models import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    build("llama", num_hidden_layers=LAYERS).save_pretrained(path)
    return str(path)


def dies(folder: str) -> None:
    mesh = init_mesh(pp=3)
    stage = load(folder, mesh)
    pipeline = Pipeline(stage, mesh, num_microbatches=3)
    ids, targets = batch_of()
    pipeline.step(ids, targets)
    if mesh.pp.rank == 1:
        stage.layers[0].register_forward_pre_hook(lambda *_: os._exit(9))
    started = time.monotonic()
    try:
        pipeline.step(ids, targets)
    except PeerError as error:
        report((str(error), time.monotonic() - started))
        raise


def test_a_stage_that_dies_is_named(folder: str) -> None:
    heard = {}
    with pytest.raises(RankError, match="rank 1 of 3"):
        launch(
            dies,
            3,
            folder,
            threads=1,
            timeout_s=30.0,
            on_report=lambda rank, said: heard.update({rank: said}),
        )
    assert heard
    for rank, (said, seconds) in heard.items():
        assert f"pipeline step (1f1b) on stage {rank} of 3 (layers" in said
        # Rank 1, or the other survivor if that has ended in the meantime.
        assert re.search(r"rank [012] .*(dead|died|gone|exited|ended)", said), said
        assert "\n" not in said
        assert seconds < 10


def refusals(folder: str) -> None:
    mesh = init_mesh(pp=2)
    stage = load(folder, mesh)
    ids, targets = batch_of()

    def refused(match: str, stages: Any = stage, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            Pipeline(stages, mesh, **{"num_microbatches": 2, **options})

    refused(r"schedule: expected one of gpipe, .* got 'fifo'", schedule="fifo")
    refused(r"num_microbatches: expected at least pp=2 .* got 1; use 'gpipe'", num_microbatches=1)
    refused("num_microbatches: expected at least 1", num_microbatches=0, schedule="gpipe")
    refused(r"stages: expected 2 or more a rank .* got 1; .* chunks=2", schedule="interleaved")
    loop, back = (load_stages(folder, mesh, chunks=2, order=o) for o in ("loop", "v"))
    refused(r"stages: expected \[.*\] of 4 .* got", back, schedule="interleaved")
    refused(r"stages: expected \[.*\] of 4 .* got", loop, schedule="zero_bubble_v")
    refused("stages: expected 1 a rank for schedule='1f1b', got 2", loop)
    refused(
        "num_microbatches: expected a multiple of its rounds .* 2, .* got 5; use 4",
        loop,
        schedule="interleaved",
        num_microbatches=5,
    )
    pipeline = Pipeline(stage, mesh, num_microbatches=2)
    with pytest.raises(ValueError, match=r"targets: expected the shape of ids \(6, 7\)"):
        pipeline.step(ids, targets[:, 1:])
    with pytest.raises(ValueError, match=r"ids: expected \[B, S\] with B > 0"):
        pipeline.step(ids[:0], targets[:0])
    with pytest.raises(ValueError, match="documents: expected None without context-parallel"):
        pipeline.step(ids, targets, documents=ids)
    with pytest.raises(ValueError, match="targets: expected one that counts, got only -100"):
        pipeline.step(ids, torch.full_like(ids, -100))


def test_bad_input_is_one_clear_line(folder: str) -> None:
    launch(refusals, 2, folder, threads=1)
