"""A parallelized transformers model generates on the CPU kernels, with transformers' own caches."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.parallelize import parallelize
from pyparallel.models.swap.own_attention import own_attention, own_mask
from tests.transformers_models import build

NEW_TOKENS = 20
PROMPTS = torch.tensor([[5, 9, 2, 40, 33, 7], [11, 12, 13, 14, 15, 16]])


def continued(model: torch.nn.Module, cache: str, padding: int = 0) -> list:
    mask = torch.ones_like(PROMPTS)
    mask[1, :padding] = 0
    return model.generate(
        PROMPTS,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        cache_implementation=cache,
    ).tolist()


def generate_on_kernels(family: str, cache: str) -> tuple[list, dict, list, dict]:
    """Tokens and calls of kernels without padding, and with."""
    model = parallelize(build(family), init_mesh(tp=torch.distributed.get_world_size()))
    calls: dict[str, int] = {}
    for op in ("linear", "attention", "linear_all_reduce"):
        row = import_module(f"pyparallel.ops.cpu.{op}")

        def counted(*args: object, run=row.run, op: str = op, **options: object) -> object:
            calls[op] = calls.get(op, 0) + 1
            return run(*args, **options)

        row.run = counted
    tokens, counted = continued(model.eval(), cache), dict(calls)
    calls.clear()
    return tokens, counted, continued(model, cache, padding=2), calls


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("family", "cache"),
    [("llama", "dynamic"), ("llama", "static"), ("qwen3", "dynamic"), ("qwen3", "static")],
)
def test_generate_of_transformers(family: str, cache: str, ranks: int) -> None:
    dense = build(family).eval()
    expected, padded = continued(dense, cache), continued(dense, cache, padding=2)
    layers, row_layers = 2, ("linear_all_reduce" if ranks > 1 else "linear")
    results = launch(generate_on_kernels, ranks, family, cache, threads=1)
    for tokens, calls, padded_tokens, padded_calls in results:
        assert tokens == expected
        # The prompt and every step but the last token's own.
        assert calls["attention"] == layers * NEW_TOKENS
        assert calls["linear"] > NEW_TOKENS and calls[row_layers] >= 2 * layers * NEW_TOKENS
        # A row of each length at a time.
        assert padded_tokens == padded
        assert padded_calls["attention"] == 2 * layers * NEW_TOKENS


def beside_sdpa(_: int) -> list[float]:
    """Largest differences of logits without a mask, padded on the left, and with a hole besides."""
    model = build("llama").eval()
    ids = torch.randint(3, 60, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    hole = mask.clone()
    hole[1, 5] = 0

    def logits() -> list[torch.Tensor]:
        found = [model(ids).logits]
        return found + [model(ids, attention_mask=m).logits[:, 9:] for m in (mask, hole)]

    with torch.no_grad():
        truth = logits()
        model = parallelize(model, init_mesh(tp=1))
        ours = logits()
    assert model.config._attn_implementation == "pyparallel"
    return [(a - b).abs().max().item() for a, b in zip(ours, truth, strict=True)]


def test_logits_with_and_without_padding() -> None:
    for difference in launch(beside_sdpa, 1, 0)[0]:
        assert difference < 1e-4


def static_cache(_: int) -> list[float]:
    """Largest differences of logits by a static cache filled in pieces of one and of several tokens."""
    dense = build("llama").eval()
    ids = torch.randint(3, 60, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = dense(ids).logits
        model = parallelize(build("llama").eval(), init_mesh(tp=1))
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        differences, begin = [], 0
        for count in (9, 1, 12, 1, 7):
            got = model(ids[:, begin : begin + count], past_key_values=cache).logits
            want = truth[:, begin : begin + count]
            differences.append((got - want).abs().max().item())
            begin += count
        # What the empty slots hold must not be read.
        for layer in cache.layers:
            layer.keys[:, :, 30:] = layer.values[:, :, 30:] = torch.nan
        got = model(ids[:, :1], past_key_values=cache).logits
    return [*differences, 0.0 if got.isfinite().all() else 1.0]


def test_a_static_cache_is_read_as_far_as_it_is_filled() -> None:
    for difference in launch(static_cache, 1, 0)[0]:
        assert difference < 1e-4


def test_values_of_another_size_than_keys() -> None:
    """Left padding, with a mask of several tokens and of one: as SDPA has it, but for the padding."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 6, 8, generator=generator) for heads in (4, 2))
    v = torch.randn(2, 2, 6, 12, generator=generator)
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[1, :2] = False
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    for first in (0, 5):
        mask = own_mask(2, 6 - first, 6, q_offset=first, attention_mask=padding)
        ours, _ = own_attention(module, q[:, :, first:], k, v, mask)
        truth, _ = sdpa_attention_forward(module, q[:, :, first:], k, v, mask)
        seen = padding[:, first:]
        torch.testing.assert_close(ours[seen], truth[seen])


def user_choice(_: int) -> str:
    model = build("llama")
    model.set_attn_implementation("eager")
    parallelize(model, init_mesh(tp=1))
    return model.config._attn_implementation


def test_another_attention_is_left_alone() -> None:
    assert launch(user_choice, 1, 0) == ["eager"]
