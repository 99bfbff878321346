"""Schedules executed on CPU ranks with random delays: bit for bit the plain path, and no race."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.overlap.simulate import run_ranks
from pyparallel.overlap.links import Mailbox, RaceError
from pyparallel.overlap.pipelines import (
    Pipeline,
    Plan,
    all_gather_linear_backward_pipeline,
    all_gather_linear_pipeline,
    linear_reduce_scatter_backward_pipeline,
    linear_reduce_scatter_pipeline,
)
from pyparallel.overlap.schedule import Step

K, N = 6, 5
DELAY = 4e-4


def row_by_row(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """A matmul whose bits do not depend on how many rows it is given, as the pipelines ask for."""
    for i in range(rows.shape[0]):
        out[i] = (rows[i].double() @ weight.double().t()).to(out.dtype)


def row_by_row_plain(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    row_by_row(rows, weight.t(), out)


class Data:
    """Random shards of every rank: the input of one call of each pipeline."""

    def __init__(self, rows: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.rows = rows
        ranks = range(len(rows))
        self.x_shard_m = [randn(m, K) for m in rows]
        self.x_full = [randn(sum(rows), K) for _ in ranks]
        self.weight = [randn(N, K) for _ in ranks]
        self.dy_shard_m = [randn(m, N) for m in rows]
        self.dy_full = [randn(sum(rows), N) for _ in ranks]

    def pipeline(self, name: str, rank: int, plan: Plan, box: Mailbox) -> Pipeline:
        link, weight = box.link(rank), self.weight[rank]
        if name == "all_gather_linear":
            x = self.x_shard_m[rank]
            return all_gather_linear_pipeline(x, weight, plan=plan, link=link, linear=row_by_row)
        if name == "linear_reduce_scatter":
            x = self.x_full[rank]
            return linear_reduce_scatter_pipeline(
                x, weight, plan=plan, link=link, linear=row_by_row
            )
        if name == "all_gather_linear_backward":
            return all_gather_linear_backward_pipeline(
                self.dy_full[rank],
                self.x_shard_m[rank],
                weight,
                plan=plan,
                link=link,
                linear=row_by_row_plain,
            )
        return linear_reduce_scatter_backward_pipeline(
            self.dy_shard_m[rank],
            self.x_full[rank],
            weight,
            plan=plan,
            link=link,
            linear=row_by_row_plain,
        )

    def run(
        self, name: str, pieces: int, *, seed: int = 0, calls: int = 1, **options
    ) -> list[tuple[Tensor, ...]]:
        box = Mailbox(len(self.rows))
        pipelines = [
            self.pipeline(name, rank, Plan(rank, self.rows, pieces, **options), box)
            for rank in range(len(self.rows))
        ]
        run_ranks(pipelines, box, seed=seed, max_delay=DELAY, calls=calls)
        return [p.results for p in pipelines]

    def dense(self, name: str) -> list[tuple[Tensor, ...]]:
        """The truth in fp64, from the shards of all ranks at once."""
        x, dy = torch.cat(self.x_shard_m).double(), torch.cat(self.dy_shard_m).double()
        weights = [w.double() for w in self.weight]
        ranks = range(len(self.rows))
        if name == "all_gather_linear":
            return [(x @ weights[r].t(),) for r in ranks]
        if name == "linear_reduce_scatter":
            total = sum(self.x_full[r].double() @ weights[r].t() for r in ranks)
            return [(part,) for part in total.split(list(self.rows))]
        if name == "all_gather_linear_backward":
            dx = sum(self.dy_full[r].double() @ weights[r] for r in ranks)
            return [
                (part, self.dy_full[r].double().t() @ x)
                for r, part in enumerate(dx.split(list(self.rows)))
            ]
        return [(dy @ weights[r], dy.t() @ self.x_full[r].double()) for r in ranks]


NAMES = [
    "all_gather_linear",
    "linear_reduce_scatter",
    "all_gather_linear_backward",
    "linear_reduce_scatter_backward",
]


def assert_same_bits(got: list[tuple[Tensor, ...]], want: list[tuple[Tensor, ...]]) -> None:
    for rank, (a, b) in enumerate(zip(got, want, strict=True)):
        for tensor, other in zip(a, b, strict=True):
            assert torch.equal(tensor, other), f"rank {rank}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", range(2, 9))
def test_bits_of_the_plain_path(name: str, size: int) -> None:
    """Any number of ranks, overlapped or not: the same bits, and the dense truth's values."""
    data = Data(tuple((3 * r + 2) % 7 for r in range(size)), torch.bfloat16, seed=size)
    plain = data.run(name, 0)
    for got, want in zip(plain, data.dense(name), strict=True):
        for tensor, truth in zip(got, want, strict=True):
            # Each of R partial sums and the result are rounded to 8 bits once.
            bound = (size + 1) * 2**-8 * max(1.0, float(truth.abs().max()) if truth.numel() else 1)
            torch.testing.assert_close(tensor.double(), truth, rtol=0, atol=bound)
    for pieces in (1, 3):
        assert_same_bits(data.run(name, pieces, seed=size + pieces), plain)
        copied = data.run(name, pieces, seed=size + pieces, transport="copy", calls=2)
        assert_same_bits(copied, plain)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    rows=st.lists(st.integers(0, 5), min_size=2, max_size=5),
    pieces=st.integers(1, 6),
    transport=st.sampled_from(["direct", "ring", "copy"]),
    seed=st.integers(0, 2**16),
)
def test_any_rows_and_pieces(
    name: str, rows: list[int], pieces: int, transport: str, seed: int
) -> None:
    data = Data(tuple(rows), torch.float32, seed)
    got = data.run(name, pieces, seed=seed, transport=transport)
    assert_same_bits(got, data.run(name, 0))


@pytest.mark.parametrize(
    ("transport", "slots"), [("direct", 1), ("direct", 3), ("ring", 3), ("copy", 1), ("copy", 3)]
)
def test_reused_slots_give_the_same_bits(transport: str, slots: int) -> None:
    data = Data((4, 1, 5, 3), torch.float32, seed=1)
    plain = data.run("all_gather_linear", 0)
    for seed in range(4):
        got = data.run("all_gather_linear", 2, seed=seed, transport=transport, slots=slots)
        assert_same_bits(got, plain)


def _without_waits(pipeline: Pipeline, action: str) -> Pipeline:
    steps = tuple(
        replace(s, waits=tuple(w for w in s.waits if w == "fork")) if s.action == action else s
        for s in pipeline.schedule.steps
    )
    return replace(pipeline, schedule=replace(pipeline.schedule, steps=steps))


def _with_slow_own_rows(pipeline: Pipeline) -> Pipeline:
    """As on a GPU, where the own rows' matmul comes behind the others on the multiprocessors."""
    run = pipeline.actions["partial"]

    def partial(step: Step) -> None:
        time.sleep(0.1 * (step.chunk[0] == pipeline.schedule.rank))
        run(step)

    return replace(pipeline, actions={**pipeline.actions, "partial": partial})


@pytest.mark.parametrize(
    ("name", "action", "options"),
    [
        ("all_gather_linear", "matmul", {}),
        ("all_gather_linear", "gather", {"slots": 1}),
        ("linear_reduce_scatter", "scatter", {}),
        ("linear_reduce_scatter", "reduce", {}),
    ],
)
def test_a_missing_wait_is_seen(name: str, action: str, options: dict) -> None:
    """Without its event a step reads too early or overwrites too early, and the run says so."""
    data = Data((4, 4, 4), torch.float32, seed=3)
    plain = data.run(name, 0)
    for seed in range(24):
        box = Mailbox(3)
        pipelines = [
            _without_waits(data.pipeline(name, r, Plan(r, data.rows, 2, **options), box), action)
            for r in range(3)
        ]
        if action == "reduce":
            pipelines = [_with_slow_own_rows(p) for p in pipelines]
        try:
            run_ranks(pipelines, box, seed=seed, max_delay=5e-3)
        except RaceError:
            return
        if not all(torch.equal(p.results[0], w[0]) for p, w in zip(pipelines, plain, strict=True)):
            return
    raise AssertionError("24 runs without the event, and nothing was seen")


def _without_meeting(pipeline: Pipeline, name: str) -> Pipeline:
    """One meeting that waits for nobody."""
    steps = tuple(
        replace(s, action="fork") if s.name == name else s for s in pipeline.schedule.steps
    )
    return replace(pipeline, schedule=replace(pipeline.schedule, steps=steps))


@pytest.mark.parametrize(
    ("name", "meeting"),
    [
        ("all_gather_linear", "gather_ready"),
        ("all_gather_linear", "gather_taken"),
        ("linear_reduce_scatter", "scatter_ready[1,0]"),
        ("linear_reduce_scatter", "scatter_taken"),
    ],
)
def test_a_missing_meeting_is_seen(name: str, meeting: str) -> None:
    """Without it a peer copies what is not there yet, or what the next call overwrites already."""
    data = Data((4, 4, 4), torch.float32, seed=3)
    plain = data.run(name, 0)
    for seed in range(24):
        box = Mailbox(3, pull_time=2e-2)
        pipelines = [
            _without_meeting(data.pipeline(name, r, Plan(r, data.rows, 1, "copy"), box), meeting)
            for r in range(3)
        ]
        try:
            run_ranks(pipelines, box, seed=seed, max_delay=1e-3, calls=3)
        except RaceError:
            return
        if not all(torch.equal(p.results[0], w[0]) for p, w in zip(pipelines, plain, strict=True)):
            return
    raise AssertionError("24 runs without the meeting, and nothing was seen")


def test_a_link_that_copies_nothing_is_refused() -> None:
    class ExchangeOnly:
        exchange = all_gather = all_to_all = None

    with pytest.raises(
        ValueError, match="transport: expected 'direct' or 'ring' over ExchangeOnly"
    ):
        linear_reduce_scatter_pipeline(
            torch.zeros(4, K),
            torch.zeros(N, K),
            plan=Plan(0, (2, 2), 1, "copy"),
            link=ExchangeOnly(),
        )


def test_a_wrong_shape_is_refused() -> None:
    box = Mailbox(2)
    with pytest.raises(ValueError, match=r"x: expected a contiguous tensor of shape \[3, 6\]"):
        all_gather_linear_pipeline(
            torch.zeros(4, K), torch.zeros(N, K), plan=Plan(0, (3, 3), 1), link=box.link(0)
        )
