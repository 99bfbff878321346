"""Training memory: counted tensors of our own layers, the paper's formulas, and published anchors."""

from __future__ import annotations

import pytest
import torch

from pyparallel.comm.group import Group
from pyparallel.models.config import from_hugging_face
from pyparallel.models.decoder import Decoder
from pyparallel.planner.engines import PYPARALLEL, engine_of
from pyparallel.planner.memory import peak
from pyparallel.planner.memory_training import in_flight, layer_bytes, training_memory
from pyparallel.planner.shape import model_shape
from pyparallel.planner.strategy import Strategy, Training
from pyparallel.training import activation_memory
from pyparallel.training.activation_memory import LayerSizes, kept_for_backward

GIB = 2**30
BATCH, TOKENS = 2, 16


def config(kind: str) -> dict:
    if kind == "gpt2":
        return {
            "model_type": kind,
            "n_embd": 96,
            "n_head": 6,
            "n_layer": 3,
            "n_inner": 320,
            "vocab_size": 70,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    return {
        "model_type": kind,
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 3,
        "intermediate_size": 320,
        "vocab_size": 70,
    }


def kept(kind: str, layers: int, recompute: str, dtype: torch.dtype) -> int:
    """Bytes that a decoder of so many layers keeps for backward."""
    sizes = config(kind) | {("n_layer" if kind == "gpt2" else "num_hidden_layers"): layers}
    model = Decoder(
        from_hugging_face(sizes), None, dtype, group=Group.single(), recompute=recompute
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    return kept_for_backward(lambda: model.hidden(ids, [0] * BATCH), list(model.parameters()))[1]


@pytest.mark.parametrize("recompute", ["none", "attention", "layers"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_layer_keeps_what_the_formula_says(kind, recompute):
    """To the byte, as the difference of three layers and two."""
    shape = model_shape(config(kind))
    strategy = Strategy(recompute=recompute)
    counted = kept(kind, 3, recompute, torch.bfloat16) - kept(kind, 2, recompute, torch.bfloat16)
    predicted = 2 * shape.hidden
    if recompute != "layers":
        predicted = layer_bytes(shape, strategy, "bf16", engine_of("pyparallel-torch"))
    assert counted == BATCH * TOKENS * predicted


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("recompute", ["none", "attention"])
def test_a_gpt_layer_is_the_papers_without_masks_and_scores(sp, recompute):
    shape = model_shape("gpt-3-175b")
    found = layer_bytes(shape, Strategy(tp=8, sp=sp, recompute=recompute), "bf16")
    sizes = LayerSizes(tokens=2048, batch=1, hidden=12288, heads=96, ranks=8)
    paper = activation_memory.layer_bytes(sizes, sequence_parallel=sp, recompute=recompute) / 2048
    # Statistics of the norms are left out in the paper.
    assert found == pytest.approx(paper + 16 / (8 if sp else 1), abs=1e-6)


def test_states_of_mixed_precision_are_18_bytes_a_parameter():
    # bf16 weights 2, fp32 gradients 4, master weights and two moments 12.
    shape = model_shape("llama-3.1-8b")
    terms = peak(training_memory(shape, Strategy(), Training(1, 128))).terms
    total = terms["weights"] + terms["gradients"] + terms["optimizer"]
    assert total == 18 * shape.parameters()


@pytest.mark.parametrize(("zero", "bytes_each"), [(0, 18), (1, 6 + 12 / 4)])
def test_zero_shares_out_the_optimizer(zero, bytes_each):
    shape = model_shape("llama-3.2-1b")
    strategy = Strategy(dp=2, cp=2, zero=zero)
    terms = peak(training_memory(shape, strategy, Training(2, 128))).terms
    total = terms["weights"] + terms["gradients"] + terms["optimizer"]
    assert total == pytest.approx(bytes_each * shape.parameters())


def test_zero_3_holds_a_part_and_the_layers_in_use():
    # Rajbhandari et al. 2020: 16 bytes a parameter over the ranks: here 4 (weights, which are the
    # master copy) + 4 (gradients) + 8, and two layers are whole.
    shape = model_shape("gpt-3-175b")
    terms = peak(training_memory(shape, Strategy(dp=64, zero=3), Training(64, 128))).terms
    shards = 16 * shape.parameters() / 64
    whole = terms["weights"] + terms["gradients"] + terms["optimizer"] - shards
    layer = shape.layer_parameters()
    assert 2 * 2 * layer <= whole <= 3 * 4 * layer


def test_pipelines_keep_micro_batches_by_their_place():
    assert [in_flight(Strategy(pp=4), place, 8) for place in range(4)] == [4, 3, 2, 1]
    assert in_flight(Strategy(pp=4), 0, 2) == 2
    # Korthikanti et al. 2022, equation 5's factor: L (1 + (p - 1) / (p m)) layers on the first stage.
    assert in_flight(Strategy(pp=8, virtual_stages=3), 0, 64) / 8 == pytest.approx(1 + 7 / 24)


def test_sequence_parallel_and_recompute_save_memory():
    shape, training = model_shape("llama-3.1-70b"), Training(8, 8192)

    def total(**options):
        return peak(training_memory(shape, Strategy(tp=8, **options), training)).terms[
            "activations"
        ]

    assert total() > total(sp=True) > total(sp=True, recompute="layers")
    assert total(cp=2) == pytest.approx(total() / 2)


def test_anchor_llama_405b_on_16_gpus_does_not_train():
    # 18 bytes x 405.9e9 / 128 GPUs are 57e9 bytes: with ZeRO 0, 16 GPUs would hold 457e9 each.
    shape = model_shape("llama-3.1-405b")
    memory = training_memory(shape, Strategy(pp=2, tp=8), Training(2, 8192))
    assert peak(memory).total > 18 * shape.parameters() / 16
    assert len(memory) == 2


def test_frozen_weights_have_no_gradients():
    shape = model_shape("llama-3.1-8b")
    terms = training_memory(shape, Strategy(), Training(1, 128, frozen=True))[0].terms
    assert terms["gradients"] == terms["optimizer"] == 0.0


def test_unknown_engines_and_batches_are_refused():
    with pytest.raises(ValueError, match="no engine is called 'vlm'; did you mean vllm"):
        engine_of("vlm")
    with pytest.raises(ValueError, match="global_batch: expected a multiple"):
        training_memory(model_shape("gpt2"), Strategy(dp=2), Training(3, 8), engine=PYPARALLEL)
