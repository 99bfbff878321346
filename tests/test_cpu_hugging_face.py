"""A parallelized transformers model generates on the CPU kernels, with transformers' own caches."""

from __future__ import annotations

import pytest
import torch

from pyparallel import backend
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.parallelize import parallelize
from tests.transformers_models import build

NEW_TOKENS = 20
PROMPTS = torch.tensor([[5, 9, 2, 40, 33, 7], [11, 12, 13, 14, 15, 16]])


def continued(model: torch.nn.Module, cache: str) -> list:
    return model.generate(
        PROMPTS,
        attention_mask=torch.ones_like(PROMPTS),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        cache_implementation=cache,
    ).tolist()


def generate_on_kernels(family: str, cache: str) -> tuple[list, dict[str, int]]:
    model = parallelize(build(family), init_mesh(tp=torch.distributed.get_world_size()))
    calls: dict[str, int] = {}
    for op in ("linear", "attention"):
        row = backend._table[op]["cpu"]

        def counted(*args: object, run=row.run, op: str = op, **options: object) -> object:
            calls[op] = calls.get(op, 0) + 1
            return run(*args, **options)

        object.__setattr__(row, "run", counted)
    return continued(model.eval(), cache), calls


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("family", "cache"), [("llama", "dynamic"), ("llama", "static"), ("qwen3", "dynamic")]
)
def test_generate_of_transformers(family: str, cache: str, ranks: int) -> None:
    dense = continued(build(family).eval(), cache)
    for tokens, calls in launch(generate_on_kernels, ranks, family, cache, threads=1):
        assert tokens == dense
        # A static cache has slots to hide in every step, which is SDPA's part.
        assert cache == "static" or calls["attention"] >= NEW_TOKENS
        assert calls["linear"] > NEW_TOKENS


def beside_sdpa(_: int) -> list[float]:
    """Largest differences of logits with a mask, without one, and with a longer cache."""
    model = build("llama").eval()
    ids = torch.randint(3, 60, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        truth = [model(ids).logits, model(ids, attention_mask=mask).logits[:, 9:]]
        model = parallelize(model, init_mesh(tp=1))
        ours = [model(ids).logits, model(ids, attention_mask=mask).logits[:, 9:]]
    assert model.config._attn_implementation == "pyparallel"
    return [(a - b).abs().max().item() for a, b in zip(ours, truth, strict=True)]


def test_logits_with_and_without_padding() -> None:
    for difference in launch(beside_sdpa, 1, 0)[0]:
        assert difference < 1e-4


def user_choice(_: int) -> str:
    model = build("llama")
    model.set_attn_implementation("eager")
    parallelize(model, init_mesh(tp=1))
    return model.config._attn_implementation


def test_another_attention_is_left_alone() -> None:
    assert launch(user_choice, 1, 0) == ["eager"]
