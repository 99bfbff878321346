"""Decoding: batches, sampling at every number of ranks, stop tokens, streaming, bad input."""

from __future__ import annotations

import pytest
import torch

from pyparallel.decoding.generate import generate
from pyparallel.decoding.logits import teacher_forced_logits
from pyparallel.decoding.stream import stream
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from pyparallel.ops.next_token import Sampling
from pyparallel.testing import poisoned_empty
from tests.transformers_models import build

PROMPTS = [[5, 9, 2, 40, 33], [7], [11, 12, 13, 14, 15, 16, 17, 18]]
SAMPLINGS = (
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.7, top_k=5, seed=4),
    Sampling(temperature=1.3, top_p=0.8, seed=5),
    Sampling(temperature=2.0, top_k=20, top_p=0.6, seed=-1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    build("llama tied").save_pretrained(path)
    return str(path)


def in_ranks(path: str, work, shares: tuple[int, ...] | None = None) -> object:
    model = load(path, init_mesh(tp=torch.distributed.get_world_size(), shares=shares))
    with poisoned_empty():
        return work(model)


def sampled(model) -> list:
    options = {"max_new_tokens": 12, "stop_ids": ()}
    return [generate(model, PROMPTS, sampling=s, **options).tokens for s in SAMPLINGS]


def test_the_same_seed_gives_the_same_tokens_at_every_number_of_ranks(folder: str) -> None:
    runs = [launch(in_ranks, ranks, folder, sampled, threads=1) for ranks in (1, 2, 3, 4)]
    runs += [launch(in_ranks, len(s), folder, sampled, s, threads=1) for s in ((3, 1), (5, 3, 1))]
    for run in runs:
        assert all(result == run[0] for result in run), "the ranks disagree"
    assert all(run[0] == runs[0][0] for run in runs)
    # Sampling that ignored the logits' order, the seed or the row would repeat itself.
    first = runs[0][0]
    assert len({tuple(tokens) for batch in first for tokens in batch}) == len(PROMPTS) * len(first)


def other_seed(model) -> list:
    options = {"max_new_tokens": 12, "stop_ids": ()}
    return [
        generate(model, PROMPTS, sampling=Sampling(1.0, seed=seed), **options).tokens
        for seed in (3, 3, 4)
    ]


def test_the_seed_decides(folder: str) -> None:
    first, again, other = launch(in_ranks, 2, folder, other_seed, threads=1)[0]
    assert first == again
    assert first != other


def streamed(model) -> tuple:
    heard: list[tuple[int, int]] = []
    free = generate(model, PROMPTS, max_new_tokens=10, stop_ids=())
    stop = free.tokens[0][4]
    made = generate(
        model,
        PROMPTS,
        max_new_tokens=10,
        stop_ids=[stop],
        on_token=lambda row, token: heard.append((row, token)),
    )
    return free.tokens, stop, made.tokens, heard, made.steps


def test_stop_tokens_end_a_row_and_the_others_go_on(folder: str) -> None:
    free, stop, made, heard, steps = launch(in_ranks, 2, folder, streamed, threads=1)[0]
    for row, tokens in enumerate(made):
        end = free[row].index(stop) + 1 if stop in free[row] else 10
        assert tokens == free[row][:end]
        assert [token for heard_row, token in heard if heard_row == row] == tokens
    assert len(made[0]) <= 5
    assert steps == max(len(tokens) for tokens in made) - 1


def streamed_by_turns(model) -> bool:
    options = {"max_new_tokens": 6, "stop_ids": ()}
    alone = [generate(model, [prompt], **options).tokens[0] for prompt in PROMPTS[:2]]
    streams = [stream(model, [prompt], **options) for prompt in PROMPTS[:2]]
    said = [[], []]
    for _ in range(6):
        for tokens, pieces in zip(said, streams, strict=True):
            tokens.append(next(pieces).token)
    return said == alone


def test_two_streams_of_a_model_go_on_by_turns(folder: str) -> None:
    assert all(launch(in_ranks, 2, folder, streamed_by_turns, threads=1))


def logits_agree(model) -> bool:
    """The tokens of cached, padded decoding are the argmax of one uncached pass."""
    made = generate(model, PROMPTS, max_new_tokens=10, stop_ids=())
    logits = teacher_forced_logits(model, PROMPTS, made.tokens)
    return [rows.argmax(-1).tolist() for rows in logits] == made.tokens


def test_the_cache_changes_nothing(folder: str) -> None:
    assert all(launch(in_ranks, 3, folder, logits_agree, threads=1))


def refusals(model) -> list[str]:
    said = []
    for prompts, new in (
        ([], 5),
        ([[1], []], 5),
        ([[1, 61]], 5),
        ([[-1]], 5),
        ([[1] * 60], 5),
        ([[1]], 0),
    ):
        try:
            generate(model, prompts, max_new_tokens=new)
        except ValueError as error:
            said.append(str(error))
    return said


def test_bad_input_is_one_clear_line(folder: str) -> None:
    for said in launch(in_ranks, 2, folder, refusals, threads=1):
        expected = (
            "prompts: expected at least one",
            "prompt 1: expected at least one token",
            "below the vocabulary's 61, got 61",
            "below the vocabulary's 61, got -1",
            "60 tokens and 5 new ones are more than the context of 64",
            "max_new_tokens: expected at least 1, got 0",
        )
        assert len(said) == len(expected)
        for words, line in zip(expected, said, strict=True):
            assert words in line
            assert "\n" not in line
