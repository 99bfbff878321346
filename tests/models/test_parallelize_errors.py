"""What parallelize() refuses: one line that names the module, and the model as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from pyparallel.comm.group import Group
from pyparallel.comm.local_engine import LocalCommunicator
from pyparallel.mesh import init_mesh
from pyparallel.models.parallelize import parallelize
from pyparallel.models.swap.stage import plan_stage
from tests.transformers_models import build

TINY = {"vocab_size": 61, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 50}


def mesh_of(ranks: int) -> SimpleNamespace:
    """Only sizes: whatever is refused is refused before the ranks talk."""
    single = Group.single()
    return SimpleNamespace(tp=Group(0, ranks, LocalCommunicator()), cp=single, pp=single)


def refused(model: nn.Module, ranks: int, *parts: str) -> None:
    before = {name: (type(m), id(m)) for name, m in model.named_modules()}
    heads = {n: vars(m).get("num_key_value_groups") for n, m in model.named_modules()}
    with pytest.raises(ValueError) as caught:
        parallelize(model, mesh_of(ranks))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert {name: (type(m), id(m)) for name, m in model.named_modules()} == before
    assert {n: vars(m).get("num_key_value_groups") for n, m in model.named_modules()} == heads


def test_no_plan() -> None:
    config = transformers.T5Config(
        vocab_size=61, d_model=16, d_ff=20, num_layers=1, num_heads=2, d_kv=8
    )
    model = transformers.T5ForConditionalGeneration(config)
    refused(
        model, 2, "'t5'", "encoder.block.0.layer.0.SelfAttention.q", "gpt2", "base_model_tp_plan"
    )


def test_mixture_of_experts() -> None:
    config = transformers.MixtralConfig(
        **TINY, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2
    )
    refused(
        transformers.MixtralForCausalLM(config), 2, "model.layers.0.mlp.experts", "packed_colwise"
    )


def test_style_that_has_no_role() -> None:
    model = build("llama")
    model.tp_plan["model.layers.*.mlp.up_proj"] = "packed_colwise"
    refused(model, 2, "model.layers.0.mlp.up_proj", "packed_colwise", "colwise_gather_output")


def test_more_ranks_than_heads() -> None:
    refused(build("gpt2"), 7, "transformer.h.0.attn", "tp=7", "6 heads", "at most tp=6")
    refused(build("llama"), 10, "model.layers.0.self_attn", "tp=10", "at most tp=9")
    refused(build("bert"), 7, "bert.encoder.layer.0.attention.self", "at most tp=6")


def test_twice() -> None:
    model = parallelize(build("llama"), init_mesh())
    refused(model, 1, "model.embed_tokens is cut already", "once")


def test_several_devices() -> None:
    model = build("llama")
    model.lm_head.to("meta")
    refused(model, 2, "one device", "cpu, meta", "device_map")


def test_not_a_transformers_model() -> None:
    refused(nn.Linear(3, 4), 2, "transformers model", "Linear")


def test_parameters_on_shards_that_no_plan_covers() -> None:
    config = transformers.CohereConfig(
        **TINY, num_attention_heads=4, num_key_value_heads=2, use_qk_norm=True
    )
    model = transformers.CohereForCausalLM(config)
    refused(model, 2, "model.layers.0.self_attn.q_norm", "CohereLayerNorm", "(4, 8)")


def test_module_of_another_type() -> None:
    class Adapted(nn.Linear):
        pass

    model = build("llama")
    model.model.layers[1].mlp.up_proj = Adapted(36, 50)
    refused(model, 2, "model.layers.1.mlp.up_proj", "Adapted", "before adding adapters")


def test_hooks_are_not_lost() -> None:
    model = build("gpt2")
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: None)
    refused(model, 2, "transformer.h.0.mlp.c_fc", "hooks")


def test_backward_hooks_and_gradient_hooks_are_not_lost() -> None:
    model = build("gpt2")
    model.lm_head.register_full_backward_hook(lambda *_: None)
    refused(model, 2, "lm_head", "backward hooks")
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda _: None)
    refused(model, 2, "model.layers.1.mlp.up_proj.weight", "gradient hooks")
    model = build("llama")
    spectral_norm(model.model.layers[0].mlp.down_proj)
    refused(model, 2, "model.layers.0.mlp.down_proj", "weight is parametrized")
    model = build("gpt2")
    model.transformer.h[0].mlp.dropout.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"h.0.mlp.dropout: has forward hooks"):
        parallelize(model, mesh_of(2), sequence_parallel=True)


def test_tie_to_a_module_that_stays_whole() -> None:
    model = build("bert")
    model.bert.embeddings.position_embeddings.weight = model.bert.embeddings.word_embeddings.weight
    refused(model, 2, "bert.embeddings.position_embeddings.weight", "tied", "no plan")


def test_head_counts_that_contradict_the_weights() -> None:
    model = build("llama")
    model.model.layers[0].self_attn.num_key_value_groups = 2
    refused(model, 2, "model.layers.0.self_attn.num_key_value_groups", "expected 3", "got 2")
    model = build("llama")
    model.model.layers[1].self_attn.k_proj = nn.Linear(36, 13)
    refused(model, 2, "model.layers.1.self_attn.k_proj", "13 features", "head_dim = 4")


def test_max_norm_is_kept_out() -> None:
    model = build("llama")
    model.model.embed_tokens.max_norm = 1.0
    refused(model, 2, "model.embed_tokens", "max_norm")


def test_layers_with_inputs_of_their_own() -> None:
    config = transformers.Gemma4TextConfig(
        **{**TINY, "num_hidden_layers": 2},
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=61,
    )
    model = transformers.Gemma4ForCausalLM(config)
    with pytest.raises(ValueError, match=r"sequence_parallel: .*hidden_size_per_layer_input=8"):
        parallelize(model, mesh_of(2), sequence_parallel=True)
    mesh = mesh_of(1)
    mesh.pp = Group(0, 2, LocalCommunicator())
    with pytest.raises(ValueError, match=r"pp: .*hidden_size_per_layer_input=8"):
        parallelize(model, mesh)


@pytest.mark.parametrize("kind", ["Granite", "Olmo", "NanoChat", "Llama"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_guard_of_stages_for_tensors_with_and_without_memory(kind: str, device: str) -> None:
    config = getattr(transformers, f"{kind}Config")(
        **{**TINY, "num_hidden_layers": 2}, num_attention_heads=4, num_key_value_heads=2
    )
    config.embedding_multiplier = 2.0
    with torch.device(device):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    tensors = {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    if kind == "Llama":
        plan_stage(model, 0, 2)
    else:
        with pytest.raises(ValueError, match=f"pp: {kind}ForCausalLM changes its hidden states"):
            plan_stage(model, 0, 2)
    assert {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())} == tensors


def test_a_plan_for_the_embedding_alone() -> None:
    config = transformers.Lfm2Config(**TINY, num_attention_heads=4, num_key_value_heads=2)
    with torch.device("meta"):
        model = transformers.Lfm2ForCausalLM(config)
    refused(
        model, 2, "'lfm2'", "covers embed_tokens", "alone", "a base_model_tp_plan for its layers"
    )
