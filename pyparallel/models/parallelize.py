"""``parallelize(model, mesh)``: a transformers model, cut over the tensor-parallel ranks in place.

Linear layers, the embedding and the LM head become their parallel twins; attention modules are told
their local head counts. The model's own forward, loss, caches and ``generate`` go on working, and give
on every rank what the dense model gives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyparallel.comm.context import ALGORITHMS
from pyparallel.comm.group import Group
from pyparallel.cut.shard import REPLICATED, Sharding
from pyparallel.layers.column_parallel_linear import ColumnParallelLinear
from pyparallel.layers.parallel_lm_head import ParallelLMHead
from pyparallel.layers.parameters import ShardedModule
from pyparallel.layers.row_parallel_linear import RowParallelLinear
from pyparallel.layers.vocab_parallel_embedding import VocabParallelEmbedding
from pyparallel.mesh import Mesh
from pyparallel.models.adapters.taken import Taken, base_of
from pyparallel.models.adapters.teach import teach_peft
from pyparallel.models.agreement import keep_alike, share_weights
from pyparallel.models.head_dropout import OwnRandomness, share_generator_state
from pyparallel.models.swap.capped_attention import use_capped_attention
from pyparallel.models.swap.context_region import check_context, cut_context
from pyparallel.models.swap.conv1d import ColumnParallelConv1D, RowParallelConv1D
from pyparallel.models.swap.cuts import AttentionCut, Cut, cuts_of, is_conv1d
from pyparallel.models.swap.local_attention import local_sizes, tell_local_heads
from pyparallel.models.swap.own_attention import use_own_attention
from pyparallel.models.swap.plans import parent_of
from pyparallel.models.swap.save_pretrained import save_dense
from pyparallel.models.swap.sequence_region import check_sequence, cut_sequence
from pyparallel.models.swap.shared_parameter import always_sum_gradients
from pyparallel.models.swap.stage import cut_stage, plan_stage
from pyparallel.models.whole_call import check_drops


class ScaledVocabParallelEmbedding(VocabParallelEmbedding):
    """A vocabulary-parallel embedding whose rows are multiplied by ``embed_scale``."""

    embed_scale: Tensor | float

    def forward(self, ids: Tensor) -> Tensor:
        scale = self.embed_scale
        if isinstance(scale, Tensor):
            scale = scale.to(self.weight.dtype)
        return super().forward(ids) * scale


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    sequence_parallel: bool = False,
    context_algorithm: str = "auto",
) -> nn.Module:
    """Cut a transformers model over ``mesh.tp``, its layers over ``mesh.pp`` and its calls over
    ``mesh.cp``, in place.

    Every rank calls it with the same model: weights loaded, or on the meta device. Afterwards each
    module whose weights are cut is a :class:`ShardedModule`, tied parameters are still one, and the
    gradient of every parameter is the dense one's slice. The ranks also get the random state of their
    first one, since whatever is replicated (dropout, sampling) has to draw alike, and get it again when
    ``model.generate`` starts; dropout inside attention draws different numbers on each rank. Weights
    that differ between ranks, as a head's that was just made do, become the first one's, with a warning
    that names them; ids of the first call that differ are a ValueError. ``save_pretrained`` is a call of
    all ranks, and writes the dense model.

    Plans of our own: GPT-2, GPT-NeoX, BERT, Phi-3, GLM. Every other type needs a ``base_model_tp_plan``
    in its config, as Llama, Mistral, Qwen2, Qwen3, Gemma and most dense decoders have; plans that cut
    experts are refused.

    LoRA of peft is cut too, on the model before or after: see docs/peft.md.

    Args:
        sequence_parallel: between the matmuls of its layers each rank works on its tokens alone; see
            :mod:`pyparallel.models.swap.sequence_region`. A call needs as many tokens as ranks, but for
            steps of generation, which are not cut. Hidden states that the model hands out from within
            its layers are then this rank's.
        context_algorithm: over several ranks of cp, "ring", "ulysses" or "auto". Such a model is called
            with whole sequences and works on this rank's tokens of them; its logits are theirs, its
            loss is all tokens'. Causal language models only, without a cache; see
            :mod:`pyparallel.models.swap.context_region`.

    Returns:
        ``model``. Over several ``mesh.pp`` ranks it is a stage, for :class:`pyparallel.Pipeline`: called
        with ids or with hidden states [B, S, H], it returns hidden states or logits.

    Raises:
        ValueError: the model is cut already, lies on several devices, has a module that can't be cut
            (the message names it), or is none that can be cut over cp, over pp, or over both; the model
            is as it was then.
    """
    teach_peft()
    base = base_of(model)
    adapters = Taken.off(base, mesh.cp.size)
    try:
        _parallelize(base, mesh, sequence_parallel, context_algorithm)
    except BaseException:
        adapters.back()
        raise
    adapters.around_the_cut()
    return model


def _parallelize(
    model: nn.Module, mesh: Mesh, sequence_parallel: bool, context_algorithm: str
) -> None:
    """:func:`parallelize` of a model without adapters."""
    group = mesh.tp
    _check(model)
    if context_algorithm not in ALGORITHMS:
        raise ValueError(
            f"context_algorithm: expected one of {', '.join(ALGORITHMS)}, got {context_algorithm!r}"
        )
    if mesh.cp.size > 1:
        check_context(model)
        if mesh.pp.size > 1:
            raise ValueError(
                f"mesh: expected pp=1 or cp=1 for a {type(model).__name__}, got pp={mesh.pp.size} and "
                f"cp={mesh.cp.size}; load() gives a decoder of the library's own, which has both"
            )
    if (sequence_parallel and group.size > 1) or mesh.pp.size > 1:
        _check_layer_inputs(model, "sequence_parallel" if mesh.pp.size == 1 else "pp")
    cuts = cuts_of(model, group)
    cores = [cut.attention.core for cut in cuts.attentions]
    if mesh.cp.size > 1:
        check_drops(model, cores)
    if sequence_parallel:
        check_sequence(model, cuts)
    stage = plan_stage(model, mesh.pp.rank, mesh.pp.size) if mesh.pp.size > 1 else None
    ties = _ties(model, cuts.modules)
    for cut in cuts.attentions:
        local_sizes(model.get_submodule(cut.attention.core), cut, group.rank)
    alike = (group, mesh.cp, mesh.pp)
    share_weights(model, alike)
    for name, cut in cuts.modules.items():
        module = model.get_submodule(name)
        if cut.kind == "shared":
            always_sum_gradients(module, group)
            continue
        twin = _twin(module, cut, group).train(module.training)
        setattr(model.get_submodule(parent_of(name)), name.rpartition(".")[2], twin)
    for names in ties:
        _tie(model, names)
    for attention in cuts.attentions:
        _localize(model, attention, group)
    keep_alike(model, alike[:2])
    if mesh.cp.size > 1:
        cut_context(model, mesh.cp, context_algorithm, cores)
        share_generator_state(mesh.cp, torch.device(mesh.device_mesh.device_type))
    else:
        use_capped_attention(model)
        if mesh.device_mesh.device_type == "cpu":
            use_own_attention(model)
    if group.size > 1:
        if sequence_parallel:
            cut_sequence(model, cuts, group)
        share_generator_state(group, torch.device(mesh.device_mesh.device_type))
    if stage is not None:
        cut_stage(model, stage)
    save_dense(model)


def named_shardings(model: nn.Module) -> dict[str, Sharding]:
    """For each of ``model.named_parameters()``: which part of the dense one this model holds."""
    held = {
        id(getattr(module, name)): sharding
        for module in model.modules()
        if isinstance(module, ShardedModule)
        for name, sharding in module.shardings.items()
    }
    return {name: held.get(id(p), REPLICATED) for name, p in model.named_parameters()}


def named_dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """For each of ``model.named_parameters()``: the dense parameter's shape."""
    dense = {
        id(getattr(module, name)): shape
        for module in model.modules()
        if isinstance(module, ShardedModule)
        for name, shape in module.dense_shapes.items()
    }
    return {name: dense.get(id(p), tuple(p.shape)) for name, p in model.named_parameters()}


def _check(model: nn.Module) -> None:
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise ValueError(
            f"model: expected a transformers model, with a config; got {type(model).__name__}"
        )
    for name, module in model.named_modules():
        if isinstance(module, ShardedModule):
            raise ValueError(
                f"model: {name} is cut already; parallelize a model once, right after it is built"
            )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ValueError(
            f"model: expected all weights on one device, got "
            f"{', '.join(sorted(map(str, devices))) or 'no weights'}; load it without device_map"
        )


def _check_layer_inputs(model: nn.Module, asked: str) -> None:
    """Raise where every layer gets inputs of its own beside the hidden states (Gemma 3n and 4)."""
    size = getattr(model.config.get_text_config(decoder=True), "hidden_size_per_layer_input", None)
    if size:
        raise ValueError(
            f"{asked}: expected a model whose layers take hidden states alone, got a "
            f"{type(model).__name__} with hidden_size_per_layer_input={size}; use tp without {asked}"
        )


def _twin(module: nn.Module, cut: Cut, group: Group) -> ShardedModule:
    if cut.kind == "embedding":
        if type(module) is nn.Embedding:
            return VocabParallelEmbedding.from_dense(module, group=group)
        twin = ScaledVocabParallelEmbedding.from_dense(module, group=group)
        scale = module.embed_scale
        if isinstance(scale, Tensor):
            twin.register_buffer("embed_scale", scale, persistent=False)
        else:
            twin.embed_scale = scale
        return twin
    if cut.kind == "lm head":
        return ParallelLMHead.from_dense(module, group=group)
    if is_conv1d(module):
        kind = ColumnParallelConv1D if cut.kind == "column" else RowParallelConv1D
        return kind.from_dense(module, group=group, sharding=cut.sharding)
    if cut.kind == "column":
        return ColumnParallelLinear.from_dense(
            module,
            group=group,
            gather_output=cut.whole,
            sharding=cut.sharding,
            replicas=cut.replicas,
        )
    return RowParallelLinear.from_dense(
        module, group=group, input_is_parallel=not cut.whole, sharding=cut.sharding
    )


def _ties(model: nn.Module, cuts: dict[str, Cut]) -> list[list[str]]:
    """The names that share a parameter, where one of its modules is cut.

    Raises:
        ValueError: a tied parameter is cut in one place and whole in another that uses it.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = []
    for group in names.values():
        cut = [name for name in group if parent_of(name) in cuts]
        if len(group) == 1 or not cut:
            continue
        for name in group:
            # A head keeps a second name for the bias of the projection inside it.
            second_name = any(parent_of(parent_of(other)) == parent_of(name) for other in cut)
            if name not in cut and not second_name:
                raise ValueError(f"{name}: tied to {cut[0]}, which is cut, but has no plan itself")
        for name in cut[1:]:
            if cuts[parent_of(name)].sharding != cuts[parent_of(cut[0])].sharding:
                raise ValueError(f"{name}: tied to {cut[0]}, but its plan cuts it in another way")
        tied.append(cut + [name for name in group if name not in cut])
    return tied


def _tie(model: nn.Module, names: list[str]) -> None:
    """Make the names share the first one's parameter again."""
    shared = model.get_parameter(names[0])
    for name in names[1:]:
        setattr(model.get_submodule(parent_of(name)), name.rpartition(".")[2], shared)


def _localize(model: nn.Module, cut: AttentionCut, group: Group) -> None:
    attention = cut.attention
    core = model.get_submodule(attention.core)
    tell_local_heads(core, cut, group.rank)
    if group.size > 1:
        OwnRandomness(core, model.get_submodule(attention.out), group)
