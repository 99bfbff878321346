"""parallelize over pp: a transformers model as a stage, its loss and gradients as dense."""

from __future__ import annotations

import pytest
import torch

from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.parallelize import named_shardings, parallelize
from pyparallel.models.stage import tied_copies
from pyparallel.testing import assert_within, dense_bound, poisoned_empty
from pyparallel.training.pipeline import Pipeline
from tests.training.pipeline_checks import LAYERS, Truth, batch_of, check_loss, family_of, truth_of
from tests.transformers_models import build

# Tied, a window, learned positions with dropout modules, a scaled embedding, other layouts of layers.
FAMILIES = ("llama tied", "mistral", "qwen3", "gpt2", "gpt_neox", "gemma3", "phi3", "starcoder2")
MICROBATCHES = 3


def whole_model(family: str) -> torch.nn.Module:
    return build(family, num_hidden_layers=LAYERS)


def truths_of(families: tuple[str, ...]) -> dict[str, Truth]:
    return {family: truth_of(whole_model(family)) for family in families}


def train(sizes: dict[str, int], truths: dict[str, Truth], sequence_parallel: bool) -> None:
    mesh = init_mesh(**sizes)
    ids, targets = batch_of()
    # Every micro-batch's sums, over the ranks.
    parts = MICROBATCHES * mesh.tp.size
    for family, truth in truths.items():
        whole = whole_model(family)
        model = parallelize(whole_model(family), mesh, sequence_parallel=sequence_parallel)
        held = sum(p.numel() for p in model.parameters())
        assert held < sum(p.numel() for p in whole.parameters()) / mesh.tp.size
        pipeline = Pipeline(model, mesh, num_microbatches=MICROBATCHES)
        with poisoned_empty():
            loss = pipeline.step(ids, targets)
            seen = pipeline.evaluate(ids, targets)
        what = f"{family} {sizes}"
        for found in (loss, seen):
            check_loss(found, truth, parts, what)
        shardings, copies = named_shardings(model), tied_copies(model)
        assert copies == {} or model.stage.is_last
        for name, parameter in model.named_parameters():
            owner = copies.get(name, name)
            exact = shardings[name].split(truth[str(torch.float64)][owner], mesh.tp.rank)
            bound = max(dense_bound(*pair, parts, what) for pair in family_of(owner, truth))
            assert_within(parameter.grad, exact, bound, f"{what} {name}")


def test_two_stages() -> None:
    launch(train, 2, {"pp": 2}, truths_of(FAMILIES), False, threads=1)


def on_four_ranks(truths: dict[str, Truth]) -> None:
    train({"pp": 2, "tp": 2}, truths, False)
    train({"pp": 2, "tp": 2}, truths, True)


def test_with_tensor_and_sequence_parallel() -> None:
    launch(on_four_ranks, 4, truths_of(("llama tied", "gpt2")), threads=1)


def test_three_stages() -> None:
    launch(train, 3, {"pp": 3}, truths_of(("llama tied", "gpt2")), False, threads=1)


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
