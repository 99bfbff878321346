"""Generation through stages: the dense tokens for every cut of layers, prompts and heads."""

from __future__ import annotations

import os
import random
import re
import time
from typing import Any

import pytest
import torch

from pyparallel import backend
from pyparallel.comm.communicator import PeerError
from pyparallel.decoding.generate import generate
from pyparallel.decoding.logits import teacher_forced_logits
from pyparallel.launch import RankError, launch, report
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load, load_stages
from pyparallel.ops.next_token import Sampling
from pyparallel.testing import poisoned_empty
from tests.transformers_models import build

FAMILIES = ("llama tied", "mistral", "gpt2")
PROMPTS = [[5, 9, 2, 40, 33], [7], [11, 12, 13, 14, 15, 16, 17, 18], [3, 3, 8]]
NEW_TOKENS = 7
SAMPLING = Sampling(temperature=0.8, top_k=20, seed=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for family in FAMILIES:
        made[family] = str(tmp_path_factory.mktemp("model"))
        build(family, num_hidden_layers=5).save_pretrained(made[family])
    return made


@pytest.fixture(scope="module")
def dense(folders: dict[str, str]) -> dict[str, Any]:
    """Tokens and logits of one rank, through the same modules."""
    return launch(made_by, 1, {}, folders, (None,), threads=1)[0]


def made_by(sizes: dict[str, Any], folders: dict[str, str], cuts: tuple) -> dict[str, Any]:
    mesh = init_mesh(**sizes)
    found: dict[str, Any] = {}
    for family, folder in folders.items():
        with poisoned_empty(), backend.use("torch"):
            model = load(folder, mesh)
            options = {"max_new_tokens": NEW_TOKENS}
            free, sampled, stopped = [], [], []
            for count in cuts:
                cut = {**options, "micro_batches": count}
                free.append(generate(model, PROMPTS, stop_ids=(), **cut).tokens)
                sampled.append(
                    generate(model, PROMPTS, stop_ids=(), sampling=SAMPLING, **cut).tokens
                )
                # Rows and micro-batches end at different steps.
                stops = (free[0][0][2], free[0][3][4])
                stopped.append(generate(model, PROMPTS, stop_ids=stops, **cut).tokens)
            for made in (free, sampled, stopped):
                assert all(tokens == made[0] for tokens in made), (family, sizes)
            found[family] = {
                "tokens": [free[0], sampled[0], stopped[0]],
                "logits": teacher_forced_logits(model, PROMPTS, free[0]),
            }
    return found


@pytest.mark.parametrize(
    "sizes",
    [
        {"pp": 2},
        {"pp": 3},
        {"pp": 2, "tp": 2},
        {"pp": 2, "cp": 2},
        {"pp": 2, "tp": 2, "shares": (3, 1)},
    ],
    ids=str,
)
def test_tokens_are_the_dense_ones(folders, dense, sizes: dict[str, Any]) -> None:
    ranks = sizes["pp"] * sizes.get("tp", 1) * sizes.get("cp", 1)
    cuts = (None, 1, 3, 4)
    for made in launch(made_by, ranks, sizes, folders, cuts, threads=1):
        for family, expected in dense.items():
            assert made[family]["tokens"] == expected["tokens"], (family, sizes)
            for ours, theirs in zip(made[family]["logits"], expected["logits"], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def traffic(folder: str) -> tuple[int, dict[str, int], list, int]:
    """What each stage sends, with a random delay in front of every layer."""
    mesh = init_mesh(pp=3)
    model = load(folder, mesh)
    chance = random.Random(mesh.pp.rank)
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda *_: time.sleep(chance.choice((0, 0, 0.005))))
    talk, sent = mesh.pp.communicator, {"hidden": 0, "tokens": 0}
    send = talk.send

    def counted(tensor: torch.Tensor, dst: int, *, tag: int = 0) -> None:
        sent["tokens" if tag else "hidden"] += 1
        send(tensor, dst, tag=tag)

    talk.send = counted
    heard: list[tuple[int, int]] = []
    made = generate(
        model,
        PROMPTS,
        max_new_tokens=4,
        stop_ids=(),
        micro_batches=2,
        on_token=lambda row, token: heard.append((row, token)),
    )
    for row, tokens in enumerate(made.tokens):
        assert [token for heard_row, token in heard if heard_row == row] == tokens
    assert made.prefill_s > 0
    assert made.decode_s > 0
    return mesh.pp.rank, sent, made.tokens, made.steps


def test_number_of_messages_with_late_stages(folders, dense) -> None:
    """A micro-batch and token: one message a boundary, and its tokens to every other stage."""
    for rank, sent, tokens, steps in launch(traffic, 3, folders["llama tied"], threads=1):
        assert sent == {"hidden": 2 * 4 if rank < 2 else 0, "tokens": 2 * 2 * 4 if rank == 2 else 0}
        assert tokens == [row[:4] for row in dense["llama tied"]["tokens"][0]]
        assert steps == 3


def dies(folder: str) -> None:
    mesh = init_mesh(pp=3)
    model = load(folder, mesh)
    calls = []

    def end(*_: object) -> None:
        calls.append(1)
        if len(calls) == 5:
            os._exit(9)

    if mesh.pp.rank == 1:
        model.layers[0].register_forward_pre_hook(end)
    started = time.monotonic()
    try:
        generate(model, PROMPTS, max_new_tokens=NEW_TOKENS, stop_ids=())
    except PeerError as error:
        report((str(error), time.monotonic() - started))
        raise


def test_a_stage_that_dies_is_named(folders) -> None:
    heard = {}
    with pytest.raises(RankError, match="rank 1 of 3"):
        launch(
            dies,
            3,
            folders["gpt2"],
            threads=1,
            timeout_s=30.0,
            on_report=lambda rank, said: heard.update({rank: said}),
        )
    assert heard
    for said, seconds in heard.values():
        assert re.search(r"message #\d+ on group 'pp' .*rank 1\b", said), said
        assert seconds < 10


def refusals(folder: str) -> None:
    mesh = init_mesh(pp=2)
    model = load(folder, mesh)
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"micro_batches: expected 1 to 4 .* got {count}"):
            generate(model, PROMPTS, max_new_tokens=2, micro_batches=count)
    with backend.use("cpu"), pytest.raises(ValueError, match=r"pipeline_session: .*cpu: not"):
        generate(model, PROMPTS, max_new_tokens=2)
    chunk = load_stages(folder, mesh, chunks=2)[0]
    with pytest.raises(ValueError, match=r"expected one stage on each rank .* stage \d of 4"):
        generate(chunk, PROMPTS, max_new_tokens=2)
    model.sequence_parallel = True
    with pytest.raises(ValueError, match="sequence_parallel: expected False"):
        generate(model, PROMPTS, max_new_tokens=2)


def test_bad_input_is_one_clear_line(folders) -> None:
    launch(refusals, 2, folders["llama tied"], threads=1)


def alone(folder: str) -> None:
    model = load(folder, init_mesh())
    with pytest.raises(ValueError, match=r"micro_batches: expected 1 to 1 .* got 2"):
        generate(model, PROMPTS, max_new_tokens=2, micro_batches=2)


def test_micro_batches_are_of_pipelines(folders) -> None:
    launch(alone, 1, folders["llama tied"], threads=1)
