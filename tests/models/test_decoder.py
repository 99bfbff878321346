"""The decoder against transformers' models of the same weights: logits, gradients, tokens."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from pyparallel.comm.collectives import count_collectives
from pyparallel.decoding.generate import generate
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from pyparallel.models.weights import sources
from pyparallel.testing import assert_as_dense, assert_within, dense_bound, poisoned_empty
from tests.orders import Exact, farthest
from tests.transformers_models import build

FAMILIES = {
    "llama": {},
    "llama tied": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {},
    "gpt_neox": {"partial_rotary_factor": 0.5},
    "gpt_neox serial": {"use_parallel_residual": False, "tie_word_embeddings": True},
    "llama 3 scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}
PROMPTS = [[5, 9, 2, 40, 33], [7], [11, 12, 13, 14, 15, 16, 17, 18]]
NEW_TOKENS = 25


def dense_model(family: str) -> torch.nn.Module:
    name = {"gpt_neox serial": "gpt_neox", "llama 3 scaling": "llama"}.get(family, family)
    return build(name, **FAMILIES[family])


def truth(model: torch.nn.Module) -> dict:
    """What transformers says: logits and gradients of one text, greedy continuations of all."""
    ids = torch.tensor([PROMPTS[2]])
    with Exact():
        exact_logits, exact_gradients = step(deepcopy(model).double(), ids)
    logits, gradients = farthest(partial(step, model, ids), (exact_logits, exact_gradients))
    continued = []
    for prompt in PROMPTS:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        continued.append(output[0, len(prompt) :].tolist())
    return {
        "tokens": continued,
        "logits": logits,
        "gradients": gradients,
        "exact logits": exact_logits,
        "exact gradients": exact_gradients,
    }


def step(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Logits, and the gradients of a loss."""
    model.zero_grad(set_to_none=True)
    logits = model(ids).logits
    F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    # transformers calls GPT-NeoX's head so in memory, but not in its checkpoints.
    gradients["embed_out.weight"] = gradients.get("lm_head.weight")
    return logits.detach(), gradients


def compare(
    folders: dict[str, str], truths: dict[str, dict], shares: tuple[int, ...] | None = None
) -> None:
    mesh = init_mesh(tp=torch.distributed.get_world_size(), shares=shares)
    for family, folder in folders.items():
        with poisoned_empty():
            model = load(folder, mesh)
            check_family(family, model, truths[family])


def joined(wanted: list, gradients: dict[str, torch.Tensor], rank: int) -> torch.Tensor:
    """A rank's share of the gradients that one of its parameters is made of."""
    parts = []
    for source in wanted:
        part = source.sharding.split(gradients[source.name], rank)
        parts.append(part.t() if source.transposed else part)
    return torch.cat(parts)


def check_family(family: str, model: torch.nn.Module, expected: dict) -> None:
    rank = model.group.rank
    ids = torch.tensor([PROMPTS[2]])
    logits = model(ids)
    size = model.group.size
    assert_as_dense(logits, expected["logits"], expected["exact logits"], size, family)
    F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    wanted = sources(model.config, model.group.shares)
    # Two sums over ranks a layer forward, and two backward: a gradient comes through all of them.
    sums = 4 * model.config.num_layers
    for name, parameter in model.named_parameters():
        what, gradients, exact = (
            f"{family} {name}",
            expected["gradients"],
            expected["exact gradients"],
        )
        bound = max(
            dense_bound(gradients[source.name], exact[source.name], sums * size, what)
            for source in wanted[name]
        )
        assert_within(parameter.grad, joined(wanted[name], exact, rank), bound, what)
    batch = generate(model, PROMPTS, max_new_tokens=NEW_TOKENS, stop_ids=())
    assert batch.tokens == expected["tokens"], family
    alone = generate(model, PROMPTS[:1], max_new_tokens=NEW_TOKENS, stop_ids=())
    assert alone.tokens == expected["tokens"][:1], family


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    folders, truths = {}, {}
    for family in FAMILIES:
        model = dense_model(family)
        folders[family] = str(tmp_path_factory.mktemp("model"))
        model.save_pretrained(folders[family])
        truths[family] = truth(model)
    return folders, truths


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_transformers(checkpoints: tuple[dict, dict], ranks: int) -> None:
    launch(compare, ranks, *checkpoints, threads=1)


# The last of four ranks share a KV head, of which there are three.
@pytest.mark.parametrize("shares", [(3, 1), (5, 3, 1), (5, 2, 1, 3)], ids=str)
def test_equals_transformers_at_unequal_shares(
    checkpoints: tuple[dict, dict], shares: tuple[int, ...]
) -> None:
    launch(compare, len(shares), *checkpoints, shares, threads=1)


def count(folder: str) -> tuple[dict, dict]:
    model = load(folder, init_mesh(tp=2))
    with count_collectives() as forward:
        logits = model.hidden(torch.tensor([PROMPTS[0]]), [0])
    with count_collectives() as backward:
        logits.sum().backward()
    return dict(forward), dict(backward)


def test_number_of_collectives(checkpoints: tuple[dict, dict]) -> None:
    """Forward: the embedding's and two a layer. Backward: two a layer."""
    forward, backward = launch(count, 2, checkpoints[0]["llama"], threads=1)[0]
    hidden_bytes = len(PROMPTS[0]) * 36 * 4
    assert forward == {"all_reduce": 5, ("all_reduce", "bytes"): 5 * hidden_bytes}
    assert backward == {"all_reduce": 4, ("all_reduce", "bytes"): 4 * hidden_bytes}


def low_precision(folder: str) -> torch.Tensor:
    model = load(folder, init_mesh(tp=2), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        return model(torch.tensor([PROMPTS[2]])).float()


def test_bfloat16_is_as_near_as_the_dense_model(checkpoints: tuple[dict, dict]) -> None:
    """Both round at the same places, a sum over two ranks once more: twice the dense error holds it."""
    folders, truths = checkpoints
    dense = dense_model("llama").bfloat16()
    exact = truths["llama"]["exact logits"]
    with torch.inference_mode():
        rounded = farthest(lambda: dense(torch.tensor([PROMPTS[2]])).logits, exact)
    dense_error = (rounded - exact).abs().max()
    error = (launch(low_precision, 2, folders["llama"], threads=1)[0] - exact).abs().max()
    assert error <= 2 * dense_error
