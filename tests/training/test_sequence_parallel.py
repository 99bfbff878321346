"""Whole decoders with the sequence cut over the ranks: loss, every gradient, every collective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.config import DecoderConfig, from_hugging_face
from pyparallel.models.decoder import Decoder
from pyparallel.models.load import load
from pyparallel.models.parallelize import named_shardings
from pyparallel.ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from pyparallel.testing import UNIT_ROUNDOFF, assert_within, dense_bound, run_ranks
from tests.orders import farthest
from tests.training.pipeline_checks import token_losses
from tests.transformers_models import build
from tests.truths import truths_of

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": False}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}
FAMILIES = {"llama": LLAMA, "qwen3": QWEN3, "gpt2": GPT2, "gpt_neox": NEOX}


def model_of(config: DecoderConfig, group: Group, dtype: torch.dtype, **options: Any) -> Decoder:
    """The same weights at every number of ranks."""
    torch.manual_seed(11)
    model = Decoder(config, group=group, **options).to(dtype)
    model.head.gather_output = False
    return model


def batch_of(config: DecoderConfig, batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    return ids, targets


def dense(config: DecoderConfig, dtype: torch.dtype, length: int) -> tuple[Tensor, list[Tensor]]:
    """The tokens' losses, and the gradients of their mean."""
    model = model_of(config, Group.single(), dtype)
    ids, targets = batch_of(config, 2, length)
    losses = token_losses(model(ids), targets)
    return losses.detach(), torch.autograd.grad(losses.mean(), list(model.parameters()))


def rounding_level(grads: list[Tensor], truth: list[Tensor]) -> float:
    """The dense model's own largest relative error, each tensor's in its largest norm.

    Of a whole model, since one small tensor may be near its truth by chance.
    """
    return max(
        float((grad.double() - true).abs().max() / true.abs().max())
        for grad, true in zip(grads, truth, strict=True)
    )


# Length, dtype and options of each comparison.
SETTINGS = (
    (8, torch.float32, {}),
    (7, torch.float32, {"recompute": "attention"}),
    (9, torch.float32, {"recompute": "layers"}),
    (11, torch.bfloat16, {}),
    (7, torch.float32, {"sequence_parallel": False, "recompute": "layers"}),
)


@dataclass(frozen=True)
class Truth:
    """What the dense model gives of one setting.

    Attributes:
        losses: the tokens', in fp64.
        rounded: the same in the setting's dtype, of several orders of its sums the farthest.
        grads: in fp64.
        level: the relative error of the gradients in the setting's dtype.
    """

    losses: Tensor
    rounded: Tensor
    grads: list[Tensor]
    level: float


def truth_of(family: str, length: int, dtype: torch.dtype) -> Truth:
    config = from_hugging_face(FAMILIES[family])
    losses, grads = dense(config, torch.float64, length)
    rounded, rounded_grads = farthest(partial(dense, config, dtype, length), (losses, grads))
    level = rounding_level(rounded_grads, grads) + UNIT_ROUNDOFF[dtype]
    return Truth(losses, rounded, grads, level)


def as_dense(group: Group, family: str, truths: list[Truth]) -> None:
    """Errors as in ``assert_as_dense``: (1 + sqrt(R)) times the dense model's in the same dtype.

    The loss is a mean, which errs no more than the worst of the tokens' losses.
    """
    config = from_hugging_face(FAMILIES[family])
    for (length, dtype, options), truth in zip(SETTINGS, truths, strict=True):
        options = {"sequence_parallel": True, **options}
        what = f"{family} S={length} {dtype} {options}"
        model = model_of(config, group, dtype, **options)
        ids, targets = batch_of(config, 2, length)
        loss = vocab_parallel_cross_entropy(
            model(ids), targets, group=group, vocab_size=config.vocab_size
        )
        grads = torch.autograd.grad(loss, list(model.parameters()))
        bound = dense_bound(truth.rounded, truth.losses, group.size, what)
        assert_within(loss, truth.losses.mean(), bound, f"{what} loss")
        factor = 1 + math.sqrt(group.size)
        shardings = named_shardings(model)
        for (name, _), grad, true in zip(model.named_parameters(), grads, truth.grads, strict=True):
            own = shardings[name].split(true, group.rank)
            bound = factor * truth.level * float(true.abs().max())
            assert_within(grad, own, bound, f"{what} d{name}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_as_dense(ranks, family):
    cases = [(family, length, dtype) for length, dtype, _ in SETTINGS]
    run_ranks(as_dense, ranks, family, truths_of(truth_of, cases))


def counted(group: Group, family: str, options: dict[str, Any]) -> tuple[dict, dict]:
    config = from_hugging_face(FAMILIES[family])
    model = model_of(config, group, torch.float32, **options)
    ids, targets = batch_of(config, 2, 7)
    with count_collectives() as forward:
        loss = vocab_parallel_cross_entropy(
            model(ids), targets, group=group, vocab_size=config.vocab_size
        )
    with count_collectives() as backward:
        torch.autograd.grad(loss, list(model.parameters()))
    return dict(forward), dict(backward)


# Calls of a whole model of L layers, over one [B, S, H] each unless said otherwise.
TENSOR = {
    # embedding; attention and MLP of each layer
    "forward": lambda layers: {"all_reduce": 1 + 2 * layers},
    # attention and MLP of each layer; head
    "backward": lambda layers: {"all_reduce": 2 * layers + 1},
}
SEQUENCE = {
    # attention and MLP of each layer gather and scatter; the head gathers, the embedding scatters
    "forward": lambda layers: {"all_gather": 2 * layers + 1, "reduce_scatter": 2 * layers + 1},
    # columns gather x again and scatter dx, rows gather dy; the head is a column, the embedding a row
    "backward": lambda layers: {"all_gather": 4 * layers + 2, "reduce_scatter": 2 * layers + 1},
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("recompute", ["none", "attention", "layers"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_collective_of_a_step(ranks, recompute, sequence_parallel):
    layers, tokens = 2, 2 * 7
    size, norm = tokens * 36 * 4, 36 * 4
    table = SEQUENCE if sequence_parallel else TENSOR
    expected = {step: dict(table[step](layers)) for step in ("forward", "backward")}
    if recompute == "layers":
        # The forward collectives of attention and MLP, once more.
        again = ("all_gather", "reduce_scatter") if sequence_parallel else ("all_reduce",)
        for name in again:
            expected["backward"][name] += 2 * layers
    for step in expected.values():
        for name, calls in list(step.items()):
            step[name, "bytes"] = calls * size
    # The loss's statistics: 16 bytes a token from every rank.
    forward = expected["forward"]
    forward["all_gather"] = forward.get("all_gather", 0) + 1
    forward["all_gather", "bytes"] = forward.get(("all_gather", "bytes"), 0) + ranks * tokens * 16
    if sequence_parallel:
        expected["backward"]["all_reduce"] = 2 * layers + 1
        expected["backward"]["all_reduce", "bytes"] = (2 * layers + 1) * norm
    options = {"sequence_parallel": sequence_parallel, "recompute": recompute}
    for found in run_ranks(counted, ranks, "llama", options):
        assert found == (expected["forward"], expected["backward"])


def same_bits(group: Group) -> list[list[float]]:
    config = from_hugging_face(LLAMA)
    runs = []
    for recompute in ("none", "none", "layers"):
        model = model_of(config, group, torch.float32, sequence_parallel=True, recompute=recompute)
        ids, targets = batch_of(config, 2, 7)
        loss = vocab_parallel_cross_entropy(
            model(ids), targets, group=group, vocab_size=config.vocab_size
        )
        norms = [
            grad
            for (name, _), grad in zip(
                model.named_parameters(),
                torch.autograd.grad(loss, list(model.parameters())),
                strict=True,
            )
            if "norm" in name
        ]
        runs.append([float(loss), *torch.cat(norms).tolist()])
    return runs


def test_replicated_results_have_the_same_bits_on_all_ranks_and_runs():
    results = run_ranks(same_bits, 3)
    assert all(run == results[0][0] for runs in results for run in runs)


def loads(folder: str) -> None:
    mesh = init_mesh(tp=torch.distributed.get_world_size())
    ids = torch.arange(14).view(2, 7)
    plain = load(folder, mesh)
    cut = load(folder, mesh, sequence_parallel=True, recompute="layers")
    error = (cut(ids) - plain(ids)).abs().max()
    assert cut.sequence_parallel and cut.recompute == "layers"
    assert error < 1e-5, error


def test_loads_a_checkpoint(tmp_path):
    build("llama").save_pretrained(tmp_path)
    launch(loads, 3, str(tmp_path))


def refused(group: Group) -> None:
    config = from_hugging_face(GPT2)
    model = Decoder(config, group=group, sequence_parallel=True)
    with pytest.raises(ValueError, match="sequence: expected at least 3 tokens"):
        model(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="sequence_parallel: expected False for a model with a"):
        model.new_cache(1, 8)
    with pytest.raises(ValueError, match="recompute: expected one of"):
        Decoder(config, group=group, recompute="all")


def test_refused():
    run_ranks(refused, 3)
