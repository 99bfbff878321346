"""Sampling's numbers and prompts as callers have them: taken, or refused in one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch

from pyparallel.comm.group import Group
from pyparallel.cut.shard import even_parts
from pyparallel.decoding.prompts import listed
from pyparallel.ops import next_token
from pyparallel.ops.next_token import Sampling, greedy, sample
from pyparallel.testing import normals, run_ranks

VOCABULARY = 203


def chosen(group: Group, options: list[dict]) -> list[list[int]]:
    logits = normals(6, VOCABULARY, seed=1, scale=4.0)
    cut = even_parts(VOCABULARY, group.size, dim=1)
    place = {"start": cut.ranges[group.rank][0][0], "group": group}
    part = cut.split(logits, group.rank)
    draws = torch.arange(6)
    found = [sample(part, Sampling(**each), draws, **place).tolist() for each in options]
    return [*found, greedy(part, **place).tolist()]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_temperature_too_small_to_divide_by_is_greedy(ranks: int) -> None:
    cold = [{"temperature": t} for t in (5e-324, 1e-308, 1e-290, 1e-200, 1e-100, 1e-20)]
    cold += [{**each, "top_k": 7, "top_p": 0.5} for each in cold]
    for *found, likeliest in run_ranks(chosen, ranks, cold):
        assert all(tokens == likeliest for tokens in found)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_top_k_of_the_vocabulary_and_more_keeps_all(ranks: int) -> None:
    counts = (0, None, VOCABULARY, 5000, 10**7, 10**8, 2**70)
    options = [{"temperature": 1.0, "top_k": k, "seed": 3} for k in counts]
    for first, *others, _ in run_ranks(chosen, ranks, options):
        assert all(tokens == first for tokens in others)


def test_a_large_top_k_offers_no_more_than_the_vocabulary() -> None:
    logits, offered = normals(2, 5000, seed=1), []
    best = next_token._best

    def watched(scores: torch.Tensor, count: int, group: Group) -> object:
        offered.append(count)
        return best(scores, count, group)

    with mock.patch.object(next_token, "_best", watched):
        for top_k in (4999, 5000, 10**9):
            sampling = Sampling(1.0, top_k)
            sample(logits, sampling, torch.arange(2), start=0, group=Group.single())
    assert offered == [4999]


def test_seeds_of_any_size() -> None:
    for seed in (0, 5, -1, 2**63 - 1, -(2**63)):
        assert Sampling(seed=seed).seed == seed
    assert Sampling(seed=2**63).seed == -(2**63)
    assert Sampling(seed=2**64 + 5).seed == 5
    seeds = [{"temperature": 1.0, "seed": seed} for seed in (2**63 + 1, 2**64 - 1, 10**30)]
    *found, _ = run_ranks(chosen, 1, seeds)[0]
    assert found[0] != found[1] != found[2]


def test_numpys_and_torchs_numbers() -> None:
    sampling = Sampling(np.float32(0.5), np.int64(3), torch.tensor(0.5), torch.tensor(7))
    assert sampling == Sampling(0.5, 3, 0.5, 7)
    numbers = [value for name, value in vars(sampling).items() if name != "rules"]
    assert all(type(number) in (int, float) for number in numbers)
    assert Sampling(top_k=None, top_p=None) == Sampling()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 2.5}, "top_k: expected a whole number, got 2.5"),
        ({"top_k": "3"}, "top_k: expected a whole number, got '3'"),
        ({"top_k": True}, "top_k: expected a whole number, got True"),
        ({"top_k": -1}, "top_k: expected 0 (all) or more, got -1"),
        ({"seed": None}, "seed: expected a whole number, got None"),
        ({"seed": 1.5}, "seed: expected a whole number, got 1.5"),
        ({"temperature": None}, "temperature: expected a number, got None"),
        ({"temperature": "1"}, "temperature: expected a number, got '1'"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ({"temperature": float("inf")}, "temperature: expected 0 or more, got inf"),
        ({"temperature": -0.1}, "temperature: expected 0 or more, got -0.1"),
        ({"temperature": [1.0, 2.0]}, "temperature: expected a number, got [1.0, 2.0]"),
        ({"top_p": 0}, "top_p: expected 0 < top_p <= 1, got 0.0"),
        ({"top_p": float("nan")}, "top_p: expected 0 < top_p <= 1, got nan"),
        ({"top_p": "x"}, "top_p: expected a number, got 'x'"),
    ],
)
def test_other_numbers_are_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        Sampling(**options)


@pytest.mark.parametrize(
    "given",
    [
        [[1, 2], [3, 4]],
        ((1, 2), (3, 4)),
        torch.tensor([[1, 2], [3, 4]]),
        np.array([[1, 2], [3, 4]]),
        [torch.tensor([1, 2]), np.array([3, 4])],
        [[np.int32(1), torch.tensor(2)], range(3, 5)],
        iter([[1, 2], [3, 4]]),
    ],
)
def test_prompts_of_every_kind(given: object) -> None:
    found = listed(given)
    assert found == [[1, 2], [3, 4]]
    assert all(type(token) is int for row in found for token in row)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("text", "prompts: expected a list of lists of token ids, got str 'text'; a tokenizer"),
        (["text"], "prompt 0: expected token ids, got str 'text'; a tokenizer makes ids of a text"),
        ([1, 2], "prompt 0: expected a list of token ids, got int 1"),
        (None, "prompts: expected a list of lists of token ids, got NoneType"),
        ({"input_ids": [[1]]}, "prompts: expected a list of lists of token ids, got dict"),
        (torch.tensor([1, 2]), "prompts: expected [batch, tokens], got shape (2,)"),
        ([torch.tensor([[1]])], "prompt 0: expected [tokens], got shape (1, 1)"),
        ([[1.0]], "prompt 0: expected a whole number, got 1.0"),
        (torch.tensor([[0.5]]), "prompt 0: expected a whole number, got 0.5"),
        ([[1], [None]], "prompt 1: expected a whole number, got None"),
    ],
)
def test_prompts_of_no_kind_are_one_line(given: object, words: str) -> None:
    call: Callable[[object], object] = listed
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        call(given)
