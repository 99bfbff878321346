"""Gemma 2 with caps so small that they matter: dense equality on two ranks, and its caps are the op
`softcap`, on shards of the vocabulary and on the scores of a rank's heads."""

from __future__ import annotations

import copy

import torch

from pyparallel import backend
from pyparallel.decoding.generate import generate
from pyparallel.mesh import Mesh
from pyparallel.models import transformers_decoder
from pyparallel.models.parallelize import parallelize
from pyparallel.models.swap import capped_attention
from pyparallel.models.transformers_decoder import TransformersDecoder
from pyparallel.ops.softcap import run_torch
from pyparallel.testing import UNIT_ROUNDOFF, assert_equal, assert_within, normals
from tests.models.test_parallelize import check_cases, on_ranks
from tests.transformers_models import build

CAPS = {"final_logit_softcapping": 0.7, "attn_logit_softcapping": 1.3}
PROMPT = [5, 17, 3, 42, 9]


def test_logits_loss_gradients_and_text_are_the_dense_model_s() -> None:
    check_cases([("gemma2", "eager", tuple(CAPS.items()))], 2)


def caps_shards(mesh: Mesh) -> None:
    dense = build("gemma2", "eager", **CAPS)
    decoder = TransformersDecoder(parallelize(copy.deepcopy(dense), mesh), mesh.tp)
    capped, widths = transformers_decoder.softcap, []

    def counted(x: torch.Tensor, cap: float) -> torch.Tensor:
        assert cap == CAPS["final_logit_softcapping"]
        widths.append(x.shape[-1])
        return capped(x, cap)

    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        hidden = decoder.hidden(ids, [0])
        whole = decoder.model(ids).logits
        transformers_decoder.softcap = run_torch
        local = decoder.head.local_logits(hidden)
        transformers_decoder.softcap = counted
        found = decoder.head.local_logits(hidden)
    sizes = [local.shape[-1], whole.shape[-1] - local.shape[-1]]
    part = whole.split(sizes if mesh.tp.rank == 0 else sizes[::-1], -1)[mesh.tp.rank]
    # transformers caps the gathered logits, by the torch row's steps: the same bits.
    assert_equal(local, part, "local logits")
    # Any row rounds the quotient, tanh (within 2 roundings) and the product: each moves the result by at
    # most a rounding of the cap.
    bound = 2 * 4 * UNIT_ROUNDOFF[torch.float32] * CAPS["final_logit_softcapping"]
    assert_within(found, part, bound, "local logits of the row that the table finds")
    assert whole.abs().max() > 0.5, "the cap does not matter"
    tokens = generate(decoder, [PROMPT], max_new_tokens=12, stop_ids=()).tokens[0]
    theirs = dense.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert tokens == theirs[0, len(PROMPT) :].tolist()
    assert set(widths) == {local.shape[-1]} and len(widths) >= 12


def test_the_head_caps_its_own_shard() -> None:
    on_ranks(caps_shards, 2)


def caps_scores(mesh: Mesh) -> None:
    dense = build("gemma2", "eager", **CAPS)
    model = parallelize(copy.deepcopy(dense), mesh)
    run, shapes = capped_attention.capped, []

    def counted(x: torch.Tensor, cap: float) -> torch.Tensor:
        assert cap == CAPS["attn_logit_softcapping"]
        shapes.append(tuple(x.shape))
        return run(x, cap)

    capped_attention.capped = counted
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        model(ids)
    attention = model.model.layers[0].self_attn
    heads = attention.o_proj.weight.shape[1] // attention.head_dim
    assert heads < dense.config.num_attention_heads
    assert shapes == [(1, heads, len(PROMPT), len(PROMPT))] * dense.config.num_hidden_layers


def test_attention_caps_the_scores_of_its_own_heads() -> None:
    on_ranks(caps_scores, 2)


def test_capped_attention_has_the_bits_of_transformers() -> None:
    """On the torch row, whose steps are transformers' own, with a mask of either kind or none."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups, module.head_dim = 2, 8
    q, k, v = (normals(2, heads, 5, 8, seed=s) for s, heads in enumerate((4, 2, 2)))
    seen = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with backend.use("torch"):
        for mask in (None, added):
            ours = capped_attention.capped_attention(module, q, k, v, mask, softcap=1.3)
            theirs = eager_attention_forward(module, q, k, v, mask, softcap=1.3)
            assert_equal(ours[0], theirs[0], "output")
            assert_equal(ours[1], theirs[1], "weights")
        boolean = capped_attention.capped_attention(module, q, k, v, seen, softcap=1.3)
    assert_equal(boolean[0], theirs[0], "output of a boolean mask")
