"""The C++ decoder of CPU ranks against the decoder of modules: every family's parts, dtype and path."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from pyparallel import _C, backend
from pyparallel.comm.group import Group
from pyparallel.cut.quantize import PackedWeight, quantize_rows
from pyparallel.decoding.cpu_decoder import CPUDecoder, compiled, reason_against
from pyparallel.decoding.generate import generate
from pyparallel.layers import ColumnParallelLinear, RowParallelLinear
from pyparallel.layers.rotary_embedding import RopeScaling
from pyparallel.models.config import DecoderConfig
from pyparallel.models.decoder import Decoder
from pyparallel.ops.next_token import Sampling
from pyparallel.testing import SEED, assert_as_dense, dense_bound, poisoned_empty, run_ranks
from tests.decoding.decoder_checks import (
    ISAS,
    KeptIn,
    engine_logits,
    instruction_set,
    instruction_sets,
)
from tests.orders import farthest

LLAMA = DecoderConfig(
    family="llama",
    vocab_size=203,
    hidden_size=72,
    intermediate_size=100,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=24,
    max_positions=1400,
    activation="swiglu",
    norm="rms",
    norm_eps=1e-5,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    rotary_dim=24,
    rope_theta=10000.0,
    rope_scaling=RopeScaling(),
    parallel_residual=False,
    windows=(None, None),
    tied=True,
    stop_ids=(),
)
CONFIGS = {
    "llama": LLAMA,
    "windows and biases": replace(
        LLAMA, windows=(300, None), qkv_bias=True, out_bias=True, mlp_bias=True, tied=False
    ),
    "qk norm, geglu": replace(LLAMA, qk_norm=True, activation="geglu_tanh", num_kv_heads=1),
    "learned positions": replace(
        LLAMA, norm="layer", rotary_dim=0, activation="gelu_tanh", mlp_bias=True, num_kv_heads=6
    ),
    "parallel residual": replace(
        LLAMA,
        norm="layer",
        rotary_dim=8,
        activation="gelu",
        parallel_residual=True,
        out_bias=True,
        mlp_bias=True,
    ),
}


def build(config: DecoderConfig, group: Group, dtype: torch.dtype = torch.float32) -> Decoder:
    """The same random model on every rank and at every number of ranks."""
    model = Decoder(config, "cpu", dtype, group=group).eval()
    generator = torch.Generator().manual_seed(SEED)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            sharding = getattr(module, "shardings", {}).get(name)
            shape = list(parameter.shape)
            if sharding is not None and sharding.dim is not None:
                shape[sharding.dim] = sharding.length
            dense = torch.randn(shape, generator=generator) * (0.5 if len(shape) == 1 else 0.15)
            if len(shape) == 1 and name == "weight":
                dense += 1
            held = dense if sharding is None else sharding.split(dense, group.rank)
            parameter.data.copy_(held)
    return model


def module_logits(model: Decoder, ids: list[int]) -> Tensor:
    """This rank's logits after every token, by the modules."""
    with backend.use("torch"):
        hidden = model.hidden(torch.tensor([ids]), [0], None)
        return model.head.local_logits(hidden)[0]


def random_ids(count: int) -> list[int]:
    return torch.randint(203, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def check_logits(group: Group, names: list[str], length: int, prefilled: int, threads: int) -> None:
    ids = random_ids(length)
    with torch.inference_mode():
        for name in names:
            model, dense = build(CONFIGS[name], group), build(CONFIGS[name], Group.single())
            begin = model.head._start
            shard = slice(prefilled - 1, None), slice(begin, begin + model.head.weight.shape[0])
            exact = module_logits(deepcopy(dense).double(), ids)
            plain = farthest(partial(module_logits, dense, ids), exact)
            ours = engine_logits(CPUDecoder(model, threads=threads), ids, prefilled)
            assert_as_dense(ours, plain, exact, group.size, name, part=lambda t, s=shard: t[s])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_logits_are_the_modules(ranks: int) -> None:
    run_ranks(check_logits, ranks, list(CONFIGS), 31, 20, 1)


def test_logits_beyond_a_chunk_and_a_split() -> None:
    """Prefill in several chunks, decode over several splits of the keys, windows that begin late."""
    run_ranks(check_logits, 2, ["llama", "windows and biases"], 1200, 1190, 1)


def test_logits_with_several_threads() -> None:
    run_ranks(check_logits, 1, list(CONFIGS), 310, 295, 3)
    run_ranks(check_logits, 2, ["llama", "parallel residual"], 40, 33, 2)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    if isa not in instruction_sets():
        pytest.skip(f"this processor has {_C.isa()}")
    with instruction_set(isa):
        check_logits(Group.single(), ["llama"], 70, 60, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    """As a model in fp32 that rounds what a cache, and a prefill's matmuls, hold in the dtype."""
    ids = random_ids(60)
    with torch.inference_mode():
        model = build(LLAMA, Group.single(), dtype)
        ours = engine_logits(CPUDecoder(model, threads=1), ids, 40)
        truth = module_logits(deepcopy(model).double(), ids)
        wide = deepcopy(model).float()

        def rounding() -> Tensor:
            with KeptIn(dtype):
                return module_logits(wide, ids)

        rounded = farthest(rounding, truth)
    assert_as_dense(ours, rounded, truth, 1, str(dtype), part=lambda t: t[39:])


def matrices(model: Decoder) -> Iterator[ColumnParallelLinear | RowParallelLinear]:
    """The layers' linear modules."""
    for layer in model.layers:
        for module in layer.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                yield module


def test_int8_logits_are_the_rounded_weights() -> None:
    ids = random_ids(50)
    with torch.inference_mode():
        model, dense = build(LLAMA, Group.single()), build(LLAMA, Group.single())
        unrounded = module_logits(deepcopy(dense).double(), ids)
        for module, plain in zip(matrices(model), matrices(dense), strict=True):
            module.quantize_weight()
            data, scale = quantize_rows(plain.weight)
            plain.weight.copy_(PackedWeight(data, "int8", torch.float32, scale).dequantized())
        exact = module_logits(deepcopy(dense).double(), ids)
        rounded = farthest(partial(module_logits, dense, ids), exact)
        ours = engine_logits(CPUDecoder(model), ids, 30)
    assert_as_dense(ours, rounded, exact, 1, "int8", part=lambda t: t[29:])
    # What the weights themselves lose is far more than that.
    assert (ours - unrounded[29:]).abs().max() > 100 * dense_bound(rounded, exact, 1, "int8")


def bits(group: Group, threads: int) -> Tensor:
    ids = random_ids(330)
    with torch.inference_mode():
        return engine_logits(CPUDecoder(build(LLAMA, group), threads=threads), ids, 300)


def test_bits_are_the_same_run_to_run_and_for_any_number_of_threads() -> None:
    once = run_ranks(bits, 2, 1)
    again = run_ranks(bits, 2, 1)
    threaded = run_ranks(bits, 2, 2)
    for a, b, c in zip(once, again, threaded, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def batched(group: Group) -> None:
    prompts = [random_ids(n) for n in (5, 40, 1, 17)]
    with torch.inference_mode():
        model = build(LLAMA, group)
        for sampling in (Sampling(), Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=4)):
            ours = generate(model, prompts, max_new_tokens=9, sampling=sampling)
            with backend.use("torch"):
                modules = generate(model, prompts, max_new_tokens=9, sampling=sampling)
            assert ours.tokens == modules.tokens
        alone = [generate(model, [p], max_new_tokens=9).tokens[0] for p in prompts]
        assert generate(model, prompts, max_new_tokens=9).tokens == alone


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_generate_runs_on_it_and_says_the_same(ranks: int) -> None:
    run_ranks(batched, ranks)


def test_generate_takes_the_cpu_session() -> None:
    model = build(LLAMA, Group.single())
    assert backend.select("decode_session", model, [[1]], 4).__name__ == "CPUSession"
    decoder = compiled(model)
    assert compiled(model) is decoder
    model.layers[0].mlp.up_proj.weight.data = model.layers[0].mlp.up_proj.weight.data.clone()
    assert compiled(model) is not decoder


def test_no_memory_is_read_before_it_is_written() -> None:
    with torch.inference_mode(), poisoned_empty():
        model = build(LLAMA, Group.single())
        assert engine_logits(CPUDecoder(model), random_ids(30), 20).isfinite().all()


def test_bad_calls_say_what_was_expected() -> None:
    model = build(LLAMA, Group.single())
    decoder = CPUDecoder(model)
    with pytest.raises(ValueError, match="cache: expected use_cache"):
        decoder.prefill([1])
    decoder.start(2, 8)
    with pytest.raises(ValueError, match="position 8 does not fit the cache's 8 slots"):
        decoder.prefill(list(range(9)))
    with pytest.raises(ValueError, match="tokens: expected 0 <= token < 203, got 203"):
        decoder.decode([203], rows=[0], positions=[0])
    with pytest.raises(ValueError, match="sequences: expected 0 <= row < batch=2, got 2"):
        decoder.prefill([1], row=2)
    with pytest.raises(ValueError, match="tokens: expected 1 to 2, got 3"):
        decoder.decode([1, 2, 3], rows=[0, 1, 1], positions=[0, 0, 1])
    decoder.prefill([1, 2, 3])
    assert decoder.logits().isfinite().all()


def test_models_it_cannot_run() -> None:
    assert "expected a pyparallel Decoder" in reason_against(torch.nn.Linear(2, 2))
    model = build(LLAMA, Group.single())
    assert reason_against(model) is None
    assert "fp32, bf16, fp16" in reason_against(model.double())
    with backend.use("cpu"), pytest.raises(backend.UnsupportedError, match="fp32, bf16, fp16"):
        generate(model, [[1]], max_new_tokens=1)
