"""Training time: rooflines and messages by hand, and what must hold whatever the constants."""

from __future__ import annotations

import pytest

from pyparallel.planner.engines import engine_of
from pyparallel.planner.hardware import cluster_of, gpu_of
from pyparallel.planner.names import shipped
from pyparallel.planner.roofline import (
    OP_SECONDS,
    Rates,
    attention_seconds,
    matmul_seconds,
    moved_seconds,
    rates_of,
)
from pyparallel.planner.shape import model_shape
from pyparallel.planner.strategy import Strategy, Training
from pyparallel.planner.training_messages import data_seconds, stage_message_seconds
from pyparallel.planner.training_time import model_flops, training_time
from pyparallel.planner.weights import stage_layers, stage_shard

H100 = gpu_of("h100")
ONES = Rates(matmul=1.0, attention=1.0, bandwidth=1.0, host_s=0.0, overlap=0.0)
SHAPE = model_shape("llama-3.1-8b")


def step(strategy, training=None, gpus=None, **options):
    training = training or Training(64, 8192)
    cluster = cluster_of("h100", gpus or strategy.ranks)
    return training_time(SHAPE, strategy, training, cluster, **options)


def test_products_take_their_flops_and_their_bytes():
    large = matmul_seconds(8192, 8192, 8192, H100, ONES, "bf16")
    expected = 2 * 8192**3 / 794.5e12 + 3 * 2 * 8192**2 / 3.35e12 + OP_SECONDS
    assert large == pytest.approx(expected)
    thin = matmul_seconds(1, 8192, 8192, H100, ONES, "bf16")
    assert thin == pytest.approx(2 * 8192**2 / 3.35e12 + OP_SECONDS, rel=0.01)
    # Operands of 8 bits, a result of 16.
    small = matmul_seconds(8192, 8192, 8192, H100, ONES, "fp8")
    expected = 2 * 8192**3 / 1402.6e12 + 4 * 8192**2 / 3.35e12 + OP_SECONDS
    assert small == pytest.approx(expected)
    assert matmul_seconds(0, 8, 8, H100, ONES, "bf16") == 0.0


def test_attention_and_elementwise_by_hand():
    found = attention_seconds(1024, 512, 8, 128, H100, ONES)
    assert found == pytest.approx(4 * 1024 * 512 * 8 * 128 / 794.5e12 + OP_SECONDS)
    assert moved_seconds(3.35e9, H100, ONES, calls=2) == pytest.approx(1e-3 + 2 * OP_SECONDS)


def test_model_flops_are_the_published_convention():
    # train_dgxc_nemo_llama31_h100.json: 4.74e14 a sequence of 8192 tokens for Llama 3.1 8B.
    training = Training(1, 8192)
    assert model_flops(SHAPE, training) == pytest.approx(4.74e14, rel=0.01)
    assert model_flops(model_shape("llama-3.1-405b"), training) == pytest.approx(2.17e16, rel=0.01)


def test_terms_add_up_and_mfu_is_of_the_peak():
    found = step(Strategy(dp=2, pp=2, tp=2, sp=True))
    training = Training(64, 8192)
    assert found.total == pytest.approx(sum(found.terms.values()))
    assert found.tokens_per_s == pytest.approx(64 * 8192 / found.total)
    expected = model_flops(SHAPE, training) / found.total / (8 * 989e12)
    assert found.mfu == pytest.approx(expected)
    assert 0.2 < found.mfu < 0.8


def test_the_bubble_of_equal_stages_is_its_formula():
    shape = model_shape("gpt-3-175b")
    cluster = cluster_of("a100", 64)
    options = {"engine": engine_of("megatron-2021"), "rates": ONES}
    for virtual in (1, 3):
        strategy = Strategy(pp=8, tp=8, virtual_stages=virtual)
        found = training_time(shape, strategy, Training(64, 2048), cluster, **options)
        idle = found.terms["bubble"]
        busy = found.total - idle - found.terms["optimizer"]
        # The head makes the last stage slower than the others.
        assert idle == pytest.approx(7 / (virtual * 64) * busy, rel=0.1)


def test_recomputing_layers_costs_a_forward():
    none, layers = step(Strategy(dp=8)), step(Strategy(dp=8, recompute="layers"))
    assert none.terms["recompute"] == 0.0
    products = none.terms["matmuls"] + none.terms["attention"] + none.terms["elementwise"]
    assert 0.2 * products < layers.terms["recompute"] < 0.4 * products


def test_small_layers_wait_for_the_host():
    rates = Rates(host_s=1e-2)
    found = step(Strategy(dp=8), Training(8, 128), rates=rates)
    assert found.terms["launches"] > 0
    # Forward and backward of each of 32 layers take a hundredth of a second at least.
    assert found.total >= 2 * 32 * 1e-2
    assert step(Strategy(dp=8), Training(8, 128), rates=ONES).terms["launches"] == 0.0


def test_frozen_weights_save_their_gradients():
    whole = step(Strategy(dp=8))
    frozen = step(Strategy(dp=8), Training(64, 8192, frozen=True))
    head = 1 / 3
    assert frozen.terms["matmuls"] < whole.terms["matmuls"] * (2 / 3 + head)
    assert frozen.terms["optimizer"] == frozen.terms["data parallel"] == 0.0
    # Sharded weights are gathered all the same, but nothing is reduced.
    gathered = step(Strategy(dp=64, zero=3), Training(64, 8192, frozen=True))
    reduced = step(Strategy(dp=64, zero=3), Training(64, 8192))
    assert 0 < gathered.terms["data parallel"] < reduced.terms["data parallel"]


def test_messages_by_hand():
    strategy = Strategy(dp=8, pp=2)
    cluster = cluster_of("h100", 16)
    message = stage_message_seconds(SHAPE, strategy, Training(8, 1024), cluster)
    size = 2 * 1024 * 4096
    assert message == pytest.approx(2 * (1e-5 + size / (0.8 * 50e9)))
    assert stage_message_seconds(SHAPE, Strategy(dp=8), Training(8, 1024), cluster) == 0.0
    shard = stage_shard(SHAPE, 1, 0, [0], stage_layers(SHAPE, 1))
    options = {"hidden_under": 0.0, "micro_batches": 1}
    alone = (shard,), Strategy(), Training(8, 1024), cluster, ONES
    assert data_seconds(*alone, **options) == 0.0
    many = (shard,), Strategy(dp=16), Training(16, 1024, gradient_dtype="bf16"), cluster, ONES
    # All of it shows where nothing hides it; under a long backward only what never overlaps.
    shown = data_seconds(*many, **options)
    assert shown > 2 * 15 / 16 * 2 * SHAPE.parameters() / 16 / 450e9
    hidden = data_seconds(*many[:-1], Rates(overlap=1.0), hidden_under=1e3, micro_batches=1)
    assert hidden == 0.0


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_more_micro_batches_hide_more_of_the_gradients(zero):
    few = step(Strategy(dp=64, zero=zero), Training(64, 2048))
    many = step(Strategy(dp=64, zero=zero), Training(1024, 2048))
    assert many.terms["data parallel"] / many.total <= few.terms["data parallel"] / few.total


def test_fsdp_gathers_for_each_micro_batch():
    few = step(Strategy(dp=64, zero=3), Training(64, 2048))
    many = step(Strategy(dp=64, zero=3), Training(1024, 2048))
    assert many.terms["data parallel"] == pytest.approx(16 * few.terms["data parallel"])


def test_constants_say_what_they_were_fitted_on():
    for name, entry in shipped("fits/training").items():
        assert entry["fitted"], name
        assert len(set(entry) - {"fitted", "published"} - set(entry.get("published", ()))) <= 5
    assert rates_of("H100-SXM5-80GB") != rates_of("MI300X") == rates_of("L40S")


def test_published_steps_within_the_planners_own_error():
    """An anchor of another file than the constants': arXiv:2205.05198, table 5."""
    shape = model_shape("gpt-3-175b")
    engine = engine_of("megatron-2021")
    full = Strategy(pp=8, tp=8, virtual_stages=3, recompute="layers")
    cluster = cluster_of("a100", 64)
    found = training_time(shape, full, Training(64, 2048, dtype="fp16"), cluster, engine=engine)
    assert found.total == pytest.approx(18.13, rel=0.1)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="global_batch: expected a multiple of dp 3"):
        step(Strategy(dp=3))
    with pytest.raises(ValueError, match="stages: expected 1 to 32"):
        step(Strategy(pp=33))
    with pytest.raises(ValueError, match="use at most tp=32"):
        step(Strategy(tp=33))
