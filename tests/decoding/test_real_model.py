"""SmolLM2-135M-Instruct, whose 9 heads and 3 KV heads divide by neither 2 nor 4, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyparallel.checkpoint.source import Checkpoint, open_checkpoint
from pyparallel.decoding.generate import generate
from pyparallel.decoding.logits import teacher_forced_logits
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.dense import load_dense, load_tokenizer, round_to_int8
from pyparallel.models.load import load
from tests.decoding.decoder_checks import FIXED_POINT

MODEL = Path(__file__).parents[2] / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea, there lived",
)
NEW_TOKENS = 24

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    assert MODEL.exists(), "run `make model` first"
    tokenizer = load_tokenizer(str(MODEL))
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def truth(
    prompts: list[list[int]],
) -> tuple[list[list[int]], list[list[int]], list[torch.Tensor]]:
    """Prompts, transformers' greedy tokens, and its logits at each of them."""
    dense = load_dense(str(MODEL), torch.float32)
    tokens, logits = [], []
    for prompt in prompts:
        with torch.inference_mode():
            output = dense.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
            tokens.append(output[0, len(prompt) :].tolist())
            logits.append(dense(output[:, :-1]).logits[0, len(prompt) - 1 :])
    return prompts, tokens, logits


def answer(
    checkpoint: Checkpoint, prompts: list[list[int]], expected: list[torch.Tensor]
) -> list[tuple[list[list[int]], float, int]]:
    """With dense weights, then with the file's blocks."""
    mesh = init_mesh(tp=torch.distributed.get_world_size())
    told = []
    for weights in (None, "blocks"):
        model = load(checkpoint, mesh, weights=weights)
        made = generate(model, prompts, max_new_tokens=NEW_TOKENS, stop_ids=())
        logits = teacher_forced_logits(model, prompts, made.tokens)
        errors = [(got - want).abs().max() for got, want in zip(logits, expected, strict=True)]
        held = sum(p.numel() * p.itemsize for p in model.parameters())
        told.append((made.tokens, float(max(errors)), held))
    return told


def answer_int8(checkpoint: Checkpoint, prompts: list[list[int]]) -> list[list[int]]:
    mesh = init_mesh(tp=torch.distributed.get_world_size())
    model = load(checkpoint, mesh, weights="int8")
    return generate(model, prompts, max_new_tokens=NEW_TOKENS, stop_ids=()).tokens


@pytest.mark.slow
def test_int8_tokens_are_those_of_the_dense_model_rounded_alike(prompts: list[list[int]]) -> None:
    dense = load_dense(str(MODEL), torch.float32)
    round_to_int8(dense)
    tokens = []
    for prompt in prompts:
        with torch.inference_mode():
            output = dense.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
        tokens.append(output[0, len(prompt) :].tolist())
    for ranks in (1, 2, 3):
        for made in launch(answer_int8, ranks, open_checkpoint(MODEL), prompts):
            assert made == tokens


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_greedy_tokens_are_the_dense_models(truth: tuple, ranks: int) -> None:
    prompts, tokens, logits = truth
    results = launch(answer, ranks, open_checkpoint(MODEL), prompts, logits)
    # All weights but the norms, which every rank holds, are cut without a remainder.
    norms = 61 * 576 * 4
    for held, num_bytes in zip(zip(*results, strict=True), (538_060_032, 96_576_768), strict=True):
        for made, error, _ in held:
            assert made == tokens
            # 30 layers of fp32 matmuls with up to 1536 terms, summed in another order.
            assert error < 1e-3
        assert sum(weights for *_, weights in held) == num_bytes + (ranks - 1) * norms
    for (_, dense_error, _), (_, blocks_error, _) in results:
        assert blocks_error <= FIXED_POINT * dense_error
