"""Serving memory: what our modules and caches allocate, by hand arithmetic, and published anchors."""

from __future__ import annotations

import pytest
import torch

from pyparallel.comm.group import Group
from pyparallel.comm.local_engine import LocalCommunicator
from pyparallel.models.config import from_hugging_face
from pyparallel.models.decoder import Decoder
from pyparallel.models.stage import stages_of
from pyparallel.planner.engines import engine_of
from pyparallel.planner.hardware import gpu_of
from pyparallel.planner.memory import fits, peak
from pyparallel.planner.memory_inference import cache_room, cache_tokens, inference_memory
from pyparallel.planner.shape import model_shape
from pyparallel.planner.strategy import Inference, Strategy
from tests.planner.test_weights import random_config

GIB = 2**30


@pytest.mark.parametrize("seed", range(100, 112))
def test_weights_and_caches_are_what_the_modules_allocate(seed):
    """The largest rank of each stage, to the byte."""
    config = random_config(seed)
    decoder, shape = from_hugging_face(config), model_shape(config)
    tp, pp = min(3, shape.heads), min(2, shape.layers)
    work = Inference(batch=3, prompt=5, output=3)
    memory = inference_memory(shape, Strategy(tp=tp, pp=pp), work)
    for stage, found in zip(stages_of(decoder, pp), memory, strict=True):
        weights, caches = [], []
        for rank in range(tp):
            group = Group(rank, tp, LocalCommunicator())
            model = Decoder(decoder, "meta", torch.bfloat16, group=group, stage=stage)
            weights.append(sum(p.numel() * p.itemsize for p in model.parameters()))
            cache = model.new_cache(3, 8)
            caches.append(sum(c.keys.nbytes + c.values.nbytes for c in cache))
        assert found.terms["weights"] == max(weights)
        assert found.terms["kv cache"] == caches[weights.index(max(weights))]


def test_kv_cache_by_hand():
    # Llama 3.1 8B: 2 x 32 layers x 8 heads x 128 x 2 bytes are 128 KiB a token.
    work = Inference(batch=4, prompt=7000, output=1000)
    shape = model_shape("llama-3.1-8b")

    def cache(**cuts):
        return inference_memory(shape, Strategy(**cuts), work)[0].terms["kv cache"]

    assert cache() == 4 * 8000 * 131072
    assert cache(tp=8) == cache() / 8
    # One KV head a rank from 8 on: replicated.
    assert cache(tp=16) == cache(tp=8)
    assert cache(cp=2) == cache() / 2


@pytest.mark.parametrize(
    ("model", "dtype", "gpu", "tp", "pp", "expected"),
    [
        ("llama-3.1-8b", "bf16", "h100", 1, 1, True),
        ("llama-3.1-70b", "bf16", "h100", 1, 1, False),
        ("llama-3.1-70b", "bf16", "h100", 4, 1, True),
        # The Llama 3 paper, section 6.1: bf16 needs two nodes, fp8 one.
        ("llama-3.1-405b", "bf16", "h100", 8, 1, False),
        ("llama-3.1-405b", "bf16", "h100", 8, 2, True),
        ("llama-3.1-405b", "fp8", "h100", 8, 1, True),
        ("llama-3.1-405b", "bf16", "mi300x", 8, 1, True),
    ],
)
def test_published_choices_fit_or_do_not(model, dtype, gpu, tp, pp, expected):
    work = Inference(batch=1, prompt=4096, output=512, weight_dtype=dtype)
    memory = inference_memory(model_shape(model), Strategy(tp=tp, pp=pp), work)
    assert fits(memory, gpu_of(gpu)) is expected


def test_a_layer_of_a_long_prompt_is_what_overflows_without_cp():
    shape = model_shape("llama-3.1-8b")
    work = Inference(batch=1, prompt=1_000_000, output=1)
    whole = inference_memory(shape, Strategy(tp=8), work)
    cut = inference_memory(shape, Strategy(tp=8, cp=4), work)
    assert peak(whole).terms["activations"] == 4 * peak(cut).terms["activations"]
    chunked = inference_memory(shape, Strategy(tp=8), work, chunk=8192)
    assert peak(chunked).largest == "kv cache"


def test_what_vllm_logs_on_an_h100():
    # vLLM's log of Llama 3 8B on one H100: 53.29 GiB of cache at 0.9 of 79.22 GiB.
    shape, engine = model_shape("llama-3-8b"), engine_of("vllm")
    room = cache_room(shape, Strategy(), gpu_of("h100"), engine=engine)
    assert room / GIB == pytest.approx(53.29, rel=0.03)
    assert cache_tokens(shape, Strategy(), room) == pytest.approx(room / 131072, abs=1)
    assert cache_tokens(shape, Strategy(), -1.0) == 0


def test_windows_shorten_caches_where_the_engine_does_so():
    shape = model_shape("gpt-oss-20b")
    work = Inference(batch=1, prompt=8192, output=1)
    ours = inference_memory(shape, Strategy(), work)[0].terms["kv cache"]
    theirs = inference_memory(shape, Strategy(), work, engine=engine_of("vllm"))[0]
    half = ours / 2
    assert theirs.terms["kv cache"] == pytest.approx(half + half * 128 / 8193)
