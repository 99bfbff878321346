"""The roofline of a pass, by hand; what must grow; what a cut must keep."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pyparallel.planner.engine_rates import Constants, engine_names, engine_rates_of
from pyparallel.planner.hardware import Cluster, Gpu, Link, cluster_of
from pyparallel.planner.inference_time import StageWork, Terms, pass_terms, pass_works, stage_terms
from pyparallel.planner.shape import ModelShape, model_shape
from pyparallel.planner.strategy import Inference, Strategy

# 1 TB/s, and best products of 80 TFLOP/s.
GPU = Gpu("a device of one's own", "none", 10**11, 1e12, 1e14)
LINK = Link("a link of one's own", 1e-6, 100e9)
CLUSTER = Cluster(GPU, 8, 8, LINK, LINK)
SHAPE = ModelShape("small", 1000, 4, 10, 10, 100, 4096, 5000, 4096)
WORK = Inference()
# Of a layer: 4 x 1000 x 1000 in attention, 3 x 1000 x 4096 in the MLP.
LAYER = 16.288e6


def works(strategy: Strategy, **options: float) -> tuple[StageWork, ...]:
    chosen = {"sequences": 1, "tokens": 1, "context": 0, **options}
    return pass_works(SHAPE, CLUSTER, strategy, WORK, kernel="nccl", **chosen)


def test_a_decode_step_by_hand() -> None:
    (work,) = works(Strategy(), sequences=3, context=99)
    assert work.read == pytest.approx(4 * LAYER * 2 / 1e12)
    assert work.compute == pytest.approx(2 * 3 * 4 * LAYER / 8e13)
    assert work.head_read == pytest.approx(5e6 * 2 / 1e12)
    # Keys and values: 2 x 10 heads x 100 x 2 bytes of each of 100 tokens, in 4 layers.
    assert work.kv_read == pytest.approx(3 * 100 * 4 * 4000 / 1e12)
    assert work.attend == pytest.approx(4 * 4 * 3 * 100 * 1000 / 8e13)
    assert (work.communication, work.send, work.sequences) == (0, 0, 3)


def test_a_prefill_by_hand() -> None:
    (work,) = works(Strategy(), tokens=1000)
    assert work.compute == pytest.approx(2 * 1000 * 4 * LAYER / 8e13)
    # Half of all pairs of queries and keys; logits of the last token alone.
    assert work.attend == pytest.approx(4 * 4 * 1000 * 500 * 1000 / 8e13)
    assert work.head_compute == pytest.approx(2 * 5e6 / 8e13)
    assert work.sequences == 0


def test_the_slower_of_bytes_and_products_counts() -> None:
    work = StageWork(1.0, 4.0, 0.0, 0.0, 2.0, 1.0, 0.25, 0.5, 10, 3)
    terms = stage_terms(work, Constants(0.5, 0.8, 0.01, 0.1, 0.001))
    assert terms == Terms(
        matmuls=pytest.approx(5.0),
        attention=pytest.approx(4.0),
        communication=0.75,
        overhead=pytest.approx(0.1 + 0.1 + 0.003),
    )


def test_tp_cuts_the_weights_and_adds_two_reductions_a_layer() -> None:
    (one,), (two,) = works(Strategy()), works(Strategy(tp=2))
    assert two.read == pytest.approx(one.read / 2)
    assert two.kv_read == pytest.approx(one.kv_read / 2)
    # 2000 bytes by two ranks: 0.4 x 4 messages and the bytes; the embedding's as well.
    reduction = 1.6e-6 + 2000 / 70e9
    assert two.communication == pytest.approx((2 * 4 + 1) * reduction)


def test_stages_have_all_of_it_between_them() -> None:
    (whole,), stages = works(Strategy(), sequences=2), works(Strategy(pp=4), sequences=2)
    for name in ("read", "compute", "head_read", "kv_read", "attend", "layers"):
        assert sum(getattr(stage, name) for stage in stages) == pytest.approx(getattr(whole, name))
    assert [stage.send > 0 for stage in stages] == [True, True, True, False]


def test_cp_cuts_a_prompt_and_the_cache() -> None:
    (one,), (two,) = (works(Strategy(cp=cp), tokens=2000) for cp in (1, 2))
    assert two.compute == pytest.approx(one.compute / 2)
    assert two.attend == pytest.approx(one.attend / 2)
    (one,), (two,) = (works(Strategy(cp=cp), context=1999) for cp in (1, 2))
    # Every context rank multiplies a single token with all weights.
    assert two.read == one.read
    assert two.kv_read == pytest.approx(one.kv_read / 2)
    assert two.communication > one.communication == 0


def test_experts_that_no_token_visits_are_not_read() -> None:
    shape = model_shape("mixtral-8x7b")
    read = [
        pass_works(
            shape, CLUSTER, Strategy(), WORK, sequences=count, tokens=1, context=0, kernel="nccl"
        )[0].read
        for count in (1, 2, 100)
    ]
    # One token reads 2 of 8 experts, two tokens 8 (1 - (3/4)^2) = 3.5, a hundred all.
    expert = 32 * 3 * 4096 * 14336 * 2 / 1e12
    assert read[1] - read[0] == pytest.approx(1.5 * expert)
    assert read[2] - read[0] == pytest.approx(6 * expert, rel=1e-6)


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(tp=8), Strategy(pp=2, tp=4)])
def test_more_work_takes_longer(strategy: Strategy) -> None:
    constants = engine_rates_of("vllm", "H100-SXM5-80GB").constants
    for name, values in {
        "sequences": (1, 8, 64, 512),
        "context": (0, 1000, 100_000),
        "tokens": (2, 64, 1024, 32_768),
    }.items():
        times = [
            pass_terms(works(strategy, **{name: value}), constants)[0].total for value in values
        ]
        assert times == sorted(set(times))


def test_weights_of_fewer_bits_are_read_sooner() -> None:
    h100 = cluster_of("h100", 8)
    read, compute = {}, {}
    for dtype in ("bf16", "fp8", "int4"):
        work = replace(WORK, weight_dtype=dtype)
        (stage,) = pass_works(
            SHAPE, h100, Strategy(), work, sequences=64, tokens=1, context=0, kernel="nccl"
        )
        read[dtype], compute[dtype] = stage.read, stage.compute
    assert read["fp8"] == pytest.approx(read["bf16"] / 2)
    assert read["int4"] == pytest.approx(read["bf16"] * 0.5625 / 2)
    # int4 is widened before it is multiplied; fp8 has products of its own.
    assert compute["int4"] == compute["bf16"] > compute["fp8"]


def test_a_gpu_that_was_not_measured_has_all_others_constants() -> None:
    for name in engine_names():
        known = engine_rates_of(name, "H100-SXM5-80GB")
        foreign = engine_rates_of(name, "H100-SXM5-80GB", as_unknown=True)
        unknown = engine_rates_of(name, "L4")
        assert known.calibrated_on.endswith(".json")
        assert foreign.calibrated_on == unknown.calibrated_on == ""
        assert known.constants != foreign.constants != unknown.constants
    with pytest.raises(ValueError, match="engine: expected one of vllm"):
        engine_rates_of("llama", "L4")
