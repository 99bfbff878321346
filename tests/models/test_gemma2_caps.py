"""Gemma 2 with caps so small that they matter: dense equality on two ranks, and the head's cap is the op
`softcap` on shards of the vocabulary."""

from __future__ import annotations

import copy

import torch

from pyparallel.decoding.generate import generate
from pyparallel.mesh import Mesh
from pyparallel.models.parallelize import parallelize
from pyparallel.models.transformers_decoder import TransformersDecoder
from pyparallel.ops import softcap
from pyparallel.testing import assert_equal
from tests.models.test_parallelize import compare, dense_tokens, on_ranks
from tests.transformers_models import build

CAPS = {"final_logit_softcapping": 0.7, "attn_logit_softcapping": 1.3}
PROMPT = [5, 17, 3, 42, 9]


def test_logits_loss_gradients_and_text_are_the_dense_model_s() -> None:
    expected = dense_tokens("gemma2", "eager", tuple(CAPS.items()))
    on_ranks(compare, 2, "gemma2", "eager", CAPS, expected)


def caps_shards(mesh: Mesh) -> None:
    dense = build("gemma2", "eager", **CAPS)
    decoder = TransformersDecoder(parallelize(copy.deepcopy(dense), mesh), mesh.tp)
    run, widths = softcap.run_torch, []

    def counted(x: torch.Tensor, cap: float) -> torch.Tensor:
        assert cap == CAPS["final_logit_softcapping"]
        widths.append(x.shape[-1])
        return run(x, cap)

    softcap.run_torch = counted
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        local = decoder.head.local_logits(decoder.hidden(ids, [0]))
        whole = decoder.model(ids).logits
    part = whole.split([local.shape[-1], whole.shape[-1] - local.shape[-1]], -1)
    if mesh.tp.rank == 1:
        part = whole.split([whole.shape[-1] - local.shape[-1], local.shape[-1]], -1)[::-1]
    # transformers caps the gathered logits, by the same steps: the same bits.
    assert_equal(local, part[0], "local logits")
    assert whole.abs().max() > 0.5, "the cap does not matter"
    tokens = generate(decoder, [PROMPT], max_new_tokens=12, stop_ids=()).tokens[0]
    theirs = dense.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert tokens == theirs[0, len(PROMPT) :].tolist()
    assert set(widths) == {local.shape[-1]} and len(widths) >= 12


def test_the_head_caps_its_own_shard() -> None:
    on_ranks(caps_shards, 2)
