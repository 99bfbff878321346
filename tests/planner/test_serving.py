"""Batches, closed loops and full load: by hand, and at their ends."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pyparallel.planner.engine_rates import engine_rates_of
from pyparallel.planner.hardware import cluster_of
from pyparallel.planner.serving import (
    MAX_SEQUENCES,
    REQUEST_S,
    WAITS,
    answer_batch,
    serve,
    serve_all,
)
from pyparallel.planner.shape import model_shape
from pyparallel.planner.strategy import Inference, Strategy

CLUSTER = cluster_of("h100", 8)
RATES = engine_rates_of("vllm", CLUSTER.gpu.name)
SHAPE = model_shape("llama-3.1-8b")
WORK = Inference(batch=4, prompt=1024, output=128)


def test_a_batch_is_a_prefill_and_its_steps() -> None:
    speed = answer_batch(SHAPE, CLUSTER, Strategy(tp=2), WORK, RATES)
    assert speed.ttft_s == pytest.approx(speed.prefill.total)
    assert speed.tpot_s == pytest.approx(speed.step.total)
    seconds = speed.ttft_s + 127 * speed.tpot_s
    assert speed.tokens_per_s == pytest.approx(4 * 128 / seconds)


def test_a_client_waits_for_the_others_prefills() -> None:
    one, many = (
        serve(SHAPE, CLUSTER, Strategy(tp=2), WORK, RATES, concurrency=clients)
        for clients in (1, 9)
    )
    assert one.tpot_s == pytest.approx(one.step.total)
    assert one.ttft_s == pytest.approx(one.prefill.total + REQUEST_S)
    # The others' prefills, but for those of clients that wait themselves.
    answered = 128 * many.tpot_s / (many.ttft_s + 128 * many.tpot_s)
    expected = many.step.total + 8 / 128 * many.prefill.total * answered
    assert many.tpot_s == pytest.approx(expected)
    assert many.ttft_s == pytest.approx((1 + 8 * WAITS) * many.prefill.total + REQUEST_S)
    assert not many.queued


def test_clients_of_an_engine_that_reads_all_prompts_first_come_in_waves() -> None:
    sglang = engine_rates_of("sglang", CLUSTER.gpu.name)
    speed = serve(SHAPE, CLUSTER, Strategy(tp=2), WORK, sglang, concurrency=9)
    # Half of the eight others' prompts are before one's own.
    assert speed.ttft_s == pytest.approx(5 * speed.prefill.total + REQUEST_S)


def test_clients_that_the_cache_has_no_room_for_wait() -> None:
    full = serve(SHAPE, CLUSTER, Strategy(), WORK, RATES, concurrency=64, kv_tokens=10 * 1088)
    assert full.queued
    assert full.running == pytest.approx(10)
    ten = serve(SHAPE, CLUSTER, Strategy(), WORK, RATES, concurrency=10)
    # Fewer of 64 clients answer at once, since more of them wait.
    assert ten.step.total < full.tpot_s <= ten.tpot_s
    # One that reserves a whole answer's room lets fewer in.
    trt = engine_rates_of("trtllm", CLUSTER.gpu.name)
    fewer = serve(SHAPE, CLUSTER, Strategy(), WORK, trt, concurrency=64, kv_tokens=10 * 1088)
    assert fewer.running == pytest.approx(10 * 1088 / 1152)


def test_more_room_gives_more_tokens_until_the_engine_has_enough() -> None:
    rates = [
        serve_all(SHAPE, CLUSTER, Strategy(), WORK, RATES, kv_tokens=1088 * count).tokens_per_s
        for count in (1, 8, 64, 512)
    ]
    assert rates == sorted(set(rates))
    most = serve_all(SHAPE, CLUSTER, Strategy(), WORK, RATES, kv_tokens=math.inf)
    assert most.running == MAX_SEQUENCES


def test_stages_work_on_parts_of_the_batch_at_once() -> None:
    # Where a step reads weights, two stages take as long for a token as one, and twice as many tokens
    # are on their way; the layers are cut 16 and 16, the last stage has the head.
    strategy = Strategy(pp=2)
    work = replace(WORK, batch=2)
    one, two = (answer_batch(SHAPE, CLUSTER, each, work, RATES) for each in (Strategy(), strategy))
    assert two.tpot_s == pytest.approx(one.tpot_s, rel=0.15)
    alone = answer_batch(SHAPE, CLUSTER, strategy, replace(WORK, batch=1), RATES)
    assert alone.tpot_s <= two.tpot_s <= 1.15 * alone.tpot_s


def test_a_replica_is_never_slower_with_a_faster_link() -> None:
    slow = cluster_of("h100", 8, intra="pcie5")
    for tp in (2, 4, 8):
        fast_step, slow_step = (
            answer_batch(SHAPE, cluster, Strategy(tp=tp), WORK, RATES).tpot_s
            for cluster in (CLUSTER, slow)
        )
        assert fast_step < slow_step
