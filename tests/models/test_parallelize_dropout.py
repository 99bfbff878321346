"""Dropout in training: alike where activations are replicated, different on every rank's heads."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pyparallel.comm.collectives import all_gather_raw
from pyparallel.comm.group import Group
from pyparallel.mesh import Mesh
from pyparallel.models.parallelize import parallelize
from pyparallel.testing import assert_equal, assert_within
from tests.models.test_parallelize import on_ranks
from tests.transformers_models import build, inputs


def same_everywhere(tensor: torch.Tensor, group: Group, what: str) -> None:
    every = all_gather_raw(tensor.detach().unsqueeze(0), group)
    for other in every:
        assert_equal(other, tensor.detach(), what)


def check_replicated(mesh: Mesh) -> None:
    """With dropout outside attention only, a seed gives the dense model's masks."""
    for name, rates in (
        ("gpt2", {"embd_pdrop": 0.3, "resid_pdrop": 0.3}),
        ("bert", {"hidden_dropout_prob": 0.3}),
        ("gpt_neox", {"hidden_dropout": 0.3}),
    ):
        dense = build(name, "eager", **rates).train()
        # Every rank comes from another place of its own.
        torch.manual_seed(mesh.tp.rank)
        model = parallelize(copy.deepcopy(dense), mesh)
        x = inputs(dense)
        state = torch.get_rng_state()
        theirs = dense(**x)
        torch.set_rng_state(state)
        ours = model(**x)
        bound = 1e-5 * float(theirs.logits.detach().abs().max())
        assert_within(ours.logits.detach(), theirs.logits.detach(), bound, name)
        # Another draw is another result: the comparison above can fail.
        assert float((model(**x).logits - ours.logits).abs().max()) > 100 * bound, name


def own_masks(mesh: Mesh, implementation: str) -> None:
    for name, rates in (
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.3}),
        ("bert", {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.3}),
    ):
        what = f"{name} {implementation}"
        torch.manual_seed(mesh.tp.rank)
        model = parallelize(build(name, implementation, **rates), mesh).train()
        x = inputs(model)
        output = model(**x, output_attentions=implementation == "eager", output_hidden_states=True)
        # The stream between the blocks, and so the common generator, is alike on all ranks. (Logits
        # always are: they are gathered.)
        for hidden in output.hidden_states:
            same_everywhere(hidden, mesh.tp, what)
        same_everywhere(torch.rand(8), mesh.tp, what + " generator")
        output.loss.backward()
        norm = next(p for n, p in model.named_parameters() if "norm" in n.lower() or "ln_" in n)
        same_everywhere(norm.grad, mesh.tp, what + " gradient")
        if implementation == "eager":
            # The first heads of ranks 0 and 1 are dropped in other places.
            kept = (output.attentions[0][:, :1] != 0).to(torch.uint8)
            first, second = all_gather_raw(kept.unsqueeze(0), mesh.tp)[:2]
            seen = torch.tril(torch.ones_like(first)).bool()
            differ = (first != second)[seen].float().mean()
            assert 0.35 < differ < 0.65, f"{what}: {differ}"
        again = model(**x).logits
        assert float((again - output.logits).abs().max()) > 1e-3, what
        model.eval()
        assert_equal(model(**x).logits, model(**x).logits, what + " without dropout")


def check_checkpointing(mesh: Mesh) -> None:
    """A recomputed layer drops what it dropped the first time."""
    model = parallelize(build("llama", "eager", attention_dropout=0.5), mesh).train()
    x = inputs(model)
    state = torch.get_rng_state()
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        torch.set_rng_state(state)
        model.zero_grad()
        model(**x, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for once, twice in zip(*gradients, strict=True):
        assert_equal(twice, once, "gradient")


def check_errors_restore(mesh: Mesh) -> None:
    """A forward that fails inside attention leaves the common generator behind."""
    model = parallelize(build("llama", "eager", attention_dropout=0.5), mesh).train()

    def fail(*_: object) -> None:
        raise KeyError("inside")

    attention: nn.Module = model.model.layers[0].self_attn
    attention.v_proj.register_forward_hook(fail)
    try:
        model(**inputs(model))
    except KeyError:
        same_everywhere(torch.rand(8), mesh.tp, "generator")
    else:
        raise AssertionError("the hook did not run")


def check_all(mesh: Mesh) -> None:
    check_replicated(mesh)
    own_masks(mesh, "eager")
    own_masks(mesh, "sdpa")
    check_checkpointing(mesh)
    check_errors_restore(mesh)


def test_dropout() -> None:
    # Over 2 ranks Llama's 9 heads are cut into 6 and 3, which draw different numbers of numbers.
    on_ranks(check_all, 2)
