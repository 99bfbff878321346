"""The next token from logits whose vocabulary is cut over the ranks, without gathering the logits.

Legend: B rows, V vocabulary, V_r this rank's. All ranks return the same ids.

Greedy: each rank offers its best (score, id). Sampled, by the Gumbel-max trick: the id with the largest
``logit / T - log(-log(u))`` is a draw from ``softmax(logit / T)``, and ``u`` is a hash of (seed, draw,
id), so a draw does not depend on how many ranks there are. Top-k and top-p first find the score below
which ids are out, from each rank's best few.
Sources: Gumbel 1954; Maddison et al. 2014, "A* sampling"; Holtzman et al. 2020 (top-p); Steele et al.
2014, "Fast splittable pseudorandom number generators" (the hash).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyparallel.comm.collectives import all_gather_raw
from pyparallel.comm.group import Group
from pyparallel.ops.logit_rules import LogitRules

# Numbers in fp32 that differ at all differ by 2^-149 or more: divided by less than this they are 10^155
# apart, where the noise of a draw is below 40.
COLDEST = 1e-200
# From here on it pays to ask first how many ids there are.
MOST_OFFERED = 1 << 12
# Each row's tokens so far, and how many of them are its prompt.
Said = tuple[Sequence[Sequence[int]], Sequence[int]]

# A rank's best few, offered first for top-p; eight times as many each time that was too few.
FIRST_OFFER = 128


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0, and what is too small to divide by, takes the likeliest
            token.
        top_k: keep the k likeliest ids (all that tie with the last); 0, None, and the vocabulary's size
            or more keep all.
        top_p: keep the smallest set of the likeliest ids with at least this probability; 1 and None keep
            all.
        seed: draws with the same seed, row and position are the same at every number of ranks; of any
            size, its last 64 bits count.
        first_row: how many rows of a larger batch come before row 0; its rows draw what they would
            there.
        min_p: keep ids that are at least so likely, as a share of the likeliest one's probability.
        rules: penalties and bans before all that; None: the model's own.

    Raises:
        ValueError: a number of another kind or outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = 0
    top_p: float | None = 1.0
    seed: int = 0
    first_row: int = 0
    min_p: float = 0.0
    rules: LogitRules | None = None

    def __post_init__(self) -> None:
        # None is how transformers' configurations say "all".
        taken = {
            "temperature": _number("temperature", self.temperature),
            "top_k": 0 if self.top_k is None else whole_number("top_k", self.top_k),
            "top_p": 1.0 if self.top_p is None else _number("top_p", self.top_p),
            "seed": _last_64_bits(whole_number("seed", self.seed)),
            "first_row": whole_number("first_row", self.first_row),
            "min_p": _number("min_p", self.min_p),
        }
        for name, value in taken.items():
            object.__setattr__(self, name, value)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (all) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected 0 < top_p <= 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected 0 to 1, got {self.min_p}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < COLDEST


def whole_number(name: str, value: object) -> int:
    """``value`` as an int, numpy's and torch's too.

    Raises:
        ValueError: it is none: 2.5, True, a text.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: expected a number, got {value!r}") from None


def _last_64_bits(value: int) -> int:
    """As a signed number, which is what torch's integers are."""
    return (value + 2**63) % 2**64 - 2**63


def greedy(logits_shard: Tensor, *, start: int, group: Group) -> Tensor:
    """The id of the largest logit; of equal ones the lowest.

    Args:
        logits_shard: [B, V_r], the ids from ``start`` on.

    Returns:
        [B], int64.
    """
    # fp64 holds every logit and every id exactly, so one tensor carries both.
    rows = logits_shard.shape[0]
    if logits_shard.shape[1]:
        best, index = logits_shard.max(-1)
        offer = torch.stack([best.double(), (index + start).double()], -1)
    else:
        offer = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64)
        offer = offer.to(logits_shard.device).expand(rows, 2)
    offers = all_gather_raw(offer.unsqueeze(0), group) if group.size > 1 else offer.unsqueeze(0)
    scores, ids = offers.unbind(-1)
    return ids.masked_fill(scores < scores.amax(0), torch.inf).amin(0).long()


def sample(
    logits_shard: Tensor,
    sampling: Sampling,
    draws: Tensor,
    *,
    start: int,
    group: Group,
    said: Said | None = None,
) -> Tensor:
    """One id a row, drawn from ``softmax(logits / temperature)`` cut by top-k, then by top-p.

    Args:
        logits_shard: [B, V_r], the ids from ``start`` on.
        draws: [B], int64: numbers the draws of one seed; no two draws may share one.
        said: each row's tokens so far and how many of them are its prompt, where there are rules.

    Returns:
        [B], int64.
    """
    if sampling.rules is not None and said is not None:
        logits_shard = sampling.rules.apply(logits_shard.float(), *said, start=start)
    if sampling.is_greedy:
        return greedy(logits_shard, start=start, group=group)
    scores = logits_shard.double() / sampling.temperature
    if top_k := _within_vocabulary(sampling.top_k, scores, group):
        best, _ = _best(scores, top_k, group)
        kth = best[:, min(top_k, best.shape[1]) - 1 :][:, :1]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if sampling.top_p < 1:
        scores = scores.masked_fill(scores < _top_p_floor(scores, sampling, group), -torch.inf)
    if sampling.min_p:
        best, _ = _best(scores, 1, group)
        least = best[:, :1] + math.log(sampling.min_p)
        scores = scores.masked_fill(scores < least, -torch.inf)
    ids = torch.arange(start, start + scores.shape[1], device=scores.device)
    noise = _gumbel(sampling.seed, draws + (sampling.first_row << 32), ids)
    return greedy(scores + noise, start=start, group=group)


def _within_vocabulary(top_k: int, scores: Tensor, group: Group) -> int:
    """``top_k``, or 0 where that is as much: what a rank offers must not grow beyond what there is."""
    if top_k <= MOST_OFFERED:
        return top_k
    width = torch.tensor([scores.shape[1]], device=scores.device)
    whole = int(all_gather_raw(width, group).sum()) if group.size > 1 else int(width)
    return top_k if top_k < whole else 0


def _best(scores: Tensor, count: int, group: Group) -> tuple[Tensor, Tensor]:
    """All ranks' ``count`` best scores, sorted [B, <= R count], and the score [B, 1] down to which
    none is missing."""
    taken = min(count, scores.shape[1])
    offer = scores.new_full((scores.shape[0], count + 1), -torch.inf)
    offer[:, :taken] = scores.topk(taken).values
    # The last place says where this rank's offer ends; -inf where it offered all it has.
    if taken < scores.shape[1]:
        offer[:, count] = offer[:, count - 1]
    offers = all_gather_raw(offer.unsqueeze(0), group) if group.size > 1 else offer.unsqueeze(0)
    best = offers[:, :, :count].transpose(0, 1).flatten(1).sort(-1, descending=True).values
    return best, offers[:, :, count].amax(0).unsqueeze(-1)


def _top_p_floor(scores: Tensor, sampling: Sampling, group: Group) -> Tensor:
    """The smallest score [B, 1] that stays in."""
    lse = scores.logsumexp(-1, keepdim=True)
    if group.size > 1:
        lse = all_gather_raw(lse.unsqueeze(0), group).logsumexp(0)
    count = FIRST_OFFER
    while True:
        best, complete_to = _best(scores, count, group)
        mass = torch.exp(best - lse).cumsum(-1)
        # An id stays while the mass before it is below p; the first always does.
        before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], -1)
        stays = before < sampling.top_p
        floor = best.masked_fill(~stays, torch.inf).amin(-1, keepdim=True)
        # A floor at the end of the offers may only be where they end, not where the mass is reached.
        if bool(((floor > complete_to) | complete_to.isneginf()).all()):
            return floor
        count *= 8


def _gumbel(seed: int, draws: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise [B, V_r] in fp64, a function of (seed, draw, id) alone."""
    key = _mix(_mix(torch.full_like(draws, seed)) ^ draws)
    bits = _mix(key.unsqueeze(-1) ^ _mix(ids))
    # 52 bits and a half: never 0 nor 1, and fp64 holds it exactly.
    uniform = ((bits >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """splitmix64: a bijection of 64-bit integers that scatters neighbours."""
    x = x + -0x61C8864680B583EB
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """The logical shift; torch's own copies the sign."""
    return (x >> bits) & ((1 << 64 - bits) - 1)
