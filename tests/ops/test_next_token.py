"""The next token: greedy ties, the sets of top-k and top-p, the distribution, the same at every R."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from pyparallel.comm.group import Group
from pyparallel.cut.shard import even_parts
from pyparallel.ops import next_token
from pyparallel.ops.next_token import Sampling, greedy, sample
from pyparallel.testing import normals, run_ranks

# 2 ids leave ranks without any.
VOCABULARIES = (1, 2, 50, 257)


def shard(logits: torch.Tensor, group: Group) -> tuple[torch.Tensor, dict]:
    cut = even_parts(logits.shape[1], group.size, dim=1)
    start = cut.ranges[group.rank][0][0]
    return cut.split(logits, group.rank), {"start": start, "group": group}


def likeliest(group: Group) -> None:
    for vocab in VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16):
            # Few values, so that most rows have ties, within a rank and across ranks.
            logits = normals(40, vocab, seed=vocab, dtype=dtype).round()
            part, place = shard(logits, group)
            ids = greedy(part, **place)
            lowest = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
            assert ids.dtype == torch.int64 and torch.equal(ids, lowest)
    part, place = shard(torch.full((3, 2), -torch.inf), group)
    assert greedy(part, **place).tolist() == [0, 0, 0]
    # Neighbours that fp32 tells apart and bf16 does not.
    logits = torch.tensor([[1.0, 1.0 + 2.0**-23, 1.0]])
    part, place = shard(logits, group)
    assert greedy(part, **place).tolist() == [1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_greedy_takes_the_lowest_of_equal_ids(ranks):
    run_ranks(likeliest, ranks)


OPTIONS = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.6, "seed": 3},
    {"temperature": 0.0, "top_k": 3},
    {"temperature": 1.0, "top_k": 10_000},
    {"temperature": 1.0, "top_p": 1e-9},
)


def drawn(group: Group) -> list[list[int]]:
    tokens = []
    for vocab in VOCABULARIES:
        logits = normals(60, vocab, seed=vocab) * 2
        part, place = shard(logits, group)
        for options in OPTIONS:
            ids = sample(part, Sampling(**options), torch.arange(60), **place)
            if options["temperature"] == 0 or options.get("top_p", 1) < 1e-6:
                assert torch.equal(ids, logits.argmax(-1))
            tokens.append(ids.tolist())
    return tokens


def test_the_same_seed_gives_the_same_tokens_at_every_number_of_ranks():
    one = run_ranks(drawn, 1)[0]
    # The draws are draws: another row, another id.
    assert len(set(map(tuple, one))) > len(VOCABULARIES) * 3
    for ranks in (2, 3, 4):
        for tokens in run_ranks(drawn, ranks):
            assert tokens == one


def kept(logits: torch.Tensor, sampling: Sampling, group: Group) -> torch.Tensor:
    """Which ids can be drawn: give each in turn a noise that beats every score."""
    part, place = shard(logits, group)
    rows, vocab = logits.shape
    found = torch.zeros(rows, vocab, dtype=torch.bool)
    for favoured in range(vocab):

        def noise(seed, draws, ids, favoured=favoured):
            return (ids == favoured).double().expand(rows, -1) * 1e6

        with mock.patch.object(next_token, "_gumbel", noise):
            ids = sample(part, sampling, torch.arange(rows), **place)
        found[:, favoured] = ids == favoured
    return found


def sets_of_transformers(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits.double())
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores > -torch.inf


def same_sets(group: Group) -> None:
    for vocab, first_offer in ((50, 128), (120, 2)):
        # A small first offer asks again and again; flat rows need many ids for their mass.
        with mock.patch.object(next_token, "FIRST_OFFER", first_offer):
            for scale in (0.1, 1.0, 4.0):
                logits = normals(6, vocab, seed=vocab) * scale
                for options in (
                    {"top_k": 1},
                    {"top_k": 7},
                    {"top_k": 200},
                    {"top_p": 0.05},
                    {"top_p": 0.5},
                    {"top_p": 0.95},
                    {"top_k": 9, "top_p": 0.7},
                ):
                    sampling = Sampling(temperature=0.8, **options)
                    ours = kept(logits, sampling, group)
                    theirs = sets_of_transformers(logits, sampling)
                    assert torch.equal(ours, theirs), (vocab, scale, options)
    # All that tie with the k-th stay in, as transformers has it.
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0, 2.0]])
    sampling = Sampling(temperature=1.0, top_k=3)
    ours = kept(logits, sampling, group)
    assert torch.equal(ours, sets_of_transformers(logits, sampling)) and ours.sum() == 5


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_top_k_and_top_p_keep_the_sets_of_transformers(ranks):
    run_ranks(same_sets, ranks)


# The chi-square that a right distribution exceeds once in 10,000 (Wilson-Hilferty approximation).
def chi_square_limit(freedom: int) -> float:
    z = 3.719
    return freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def histogram(group: Group, options: dict, draws: int) -> torch.Tensor:
    logits = normals(1, 11, seed=4).expand(draws, 11)
    part, place = shard(logits, group)
    ids = sample(part, Sampling(**options), torch.arange(draws), **place)
    return torch.bincount(ids, minlength=11).double()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.5, "seed": 2**40},
        {"temperature": 1.5, "top_k": 6},
        {"temperature": 1.0, "top_p": 0.8},
    ],
    ids=str,
)
def test_draws_have_the_right_distribution(options):
    draws = 40_000
    counts = histogram(Group.single(), options, draws)
    logits = normals(1, 11, seed=4)
    seen = sets_of_transformers(logits, Sampling(**options))[0]
    scores = (logits[0].double() / options["temperature"]).masked_fill(~seen, -torch.inf)
    probabilities = scores.softmax(-1)
    assert not counts[~seen].any()
    limit = chi_square_limit(int(seen.sum()) - 1)
    assert chi_square(counts[seen], probabilities[seen]) < limit
    # A slightly wrong temperature would be seen.
    wrong = (scores * 1.05).softmax(-1)
    assert chi_square(counts[seen], wrong[seen]) > limit or options["temperature"] == 1.5


def test_rows_and_seeds_draw_independently():
    """Pairs of neighbouring draws, and of equal draws under neighbouring seeds, are independent."""
    logits = torch.zeros(20_000, 4)
    draws = torch.arange(20_000)
    place = {"start": 0, "group": Group.single()}
    first = sample(logits, Sampling(temperature=1.0, seed=0), draws, **place)
    second = sample(logits, Sampling(temperature=1.0, seed=1), draws, **place)
    flat = torch.full((16,), 1 / 16, dtype=torch.float64)
    for left, right in ((first, second), (first[:-1], first[1:])):
        pairs = torch.bincount(4 * left + right, minlength=16).double()
        assert chi_square(pairs, flat) < chi_square_limit(15)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ({"top_k": -1}, r"top_k: expected 0 \(all\) or more, got -1"),
        ({"top_p": 0.0}, "top_p: expected 0 < top_p <= 1, got 0.0"),
        ({"top_p": 1.5}, "top_p: expected 0 < top_p <= 1, got 1.5"),
    ],
)
def test_bad_options_are_named(options, told):
    with pytest.raises(ValueError, match=told):
        Sampling(**options)
