"""parallelize over pp: a transformers model as a stage, its loss and gradients as dense."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.parallelize import named_shardings, parallelize
from pyparallel.models.stage import tied_copies
from pyparallel.testing import poisoned_empty
from pyparallel.training.pipeline import Pipeline
from tests.pipeline_checks import LAYERS, batch_of
from tests.transformers_models import build

# Tied, a window, learned positions with dropout modules, a scaled embedding, other layouts of layers.
FAMILIES = ("llama tied", "mistral", "qwen3", "gpt2", "gpt_neox", "gemma3", "phi3", "starcoder2")


def dense(family: str) -> tuple[torch.nn.Module, torch.Tensor]:
    model = build(family, num_hidden_layers=LAYERS)
    ids, targets = batch_of()
    logits = model(ids).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    return model, loss.detach()


def train(sizes: dict[str, int], families: tuple, sequence_parallel: bool) -> None:
    mesh = init_mesh(**sizes)
    ids, targets = batch_of()
    for family in families:
        whole, expected = dense(family)
        gradients = {name: p.grad for name, p in whole.named_parameters()}
        model = parallelize(
            build(family, num_hidden_layers=LAYERS), mesh, sequence_parallel=sequence_parallel
        )
        held = sum(p.numel() for p in model.parameters())
        assert held < sum(p.numel() for p in whole.parameters()) / mesh.tp.size
        pipeline = Pipeline(model, mesh, num_microbatches=3)
        with poisoned_empty():
            loss = pipeline.step(ids, targets)
            seen = pipeline.evaluate(ids, targets)
        for found in (loss, seen):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=family)
        shardings, copies = named_shardings(model), tied_copies(model)
        assert copies == {} or model.stage.is_last
        for name, parameter in model.named_parameters():
            truth = shardings[name].split(gradients[copies.get(name, name)], mesh.tp.rank)
            scale = float(truth.abs().max()) + 1e-3
            torch.testing.assert_close(
                parameter.grad,
                truth,
                rtol=1e-4,
                atol=1e-4 * scale,
                msg=lambda m, n=name, f=family: f"{f} {sizes} {n}: {m}",
            )


def test_two_stages() -> None:
    launch(train, 2, {"pp": 2}, FAMILIES, False, threads=1)


def on_four_ranks(families: tuple) -> None:
    train({"pp": 2, "tp": 2}, families, False)
    train({"pp": 2, "tp": 2}, families, True)


def test_with_tensor_and_sequence_parallel() -> None:
    launch(on_four_ranks, 4, ("llama tied", "gpt2"), threads=1)


def test_three_stages() -> None:
    launch(train, 3, {"pp": 3}, ("llama tied", "gpt2"), False, threads=1)


def refusals() -> None:
    mesh = init_mesh(pp=2)
    for model, words in (
        (build("bert"), "BertForMaskedLM can't be cut into stages"),
        # Its base model multiplies what enters, which would be done on every stage.
        (
            build("granite", embedding_multiplier=2.0),
            "GraniteForCausalLM changes its hidden states",
        ),
    ):
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=f"pp: {words}.*use pp=1"):
            parallelize(model, mesh)
        assert {name: type(module) for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match=r"stages: expected 1 to 1, .* got 2; use a smaller pp"):
        parallelize(build("llama", num_hidden_layers=1), mesh)


def both_cuts() -> None:
    with pytest.raises(
        ValueError, match=r"mesh: expected pp=1 or cp=1 for a LlamaForCausalLM.*load\(\)"
    ):
        parallelize(build("llama"), init_mesh(pp=2, cp=2))


def test_stages_over_cut_sequences_are_refused() -> None:
    launch(both_cuts, 4, threads=1)


def test_models_that_have_no_stages_are_refused_by_name() -> None:
    launch(refusals, 2, threads=1)
