"""What peft is told of modules that are cut: how to put LoRA around one, and how to save its files.

peft finds its layer for a module by the module's class, and a parallel layer is of none that it knows.
It is shown the dense layer's size, type and device without its memory, makes its own layer with whole
adapters, drawn as ever, and that layer is put around the parallel one.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pyparallel.layers.column_parallel_linear import ColumnParallelLinear
from pyparallel.layers.parameters import ShardedModule
from pyparallel.layers.row_parallel_linear import RowParallelLinear
from pyparallel.layers.vocab_parallel_embedding import VocabParallelEmbedding
from pyparallel.models.adapters.configs import check_config
from pyparallel.models.decoder import Decoder
from pyparallel.models.swap.conv1d import ColumnParallelConv1D, RowParallelConv1D
from pyparallel.models.swap.stage import StageModel

_LINEAR = (ColumnParallelLinear, RowParallelLinear, ColumnParallelConv1D, RowParallelConv1D)
COMBINATIONS = ("cat", "linear")


@functools.cache
def teach_peft() -> None:
    """Let peft, if it is installed, know modules that are cut; once."""
    if importlib.util.find_spec("peft") is None:
        return
    from peft import PeftModel, PeftModelForCausalLM
    from peft import peft_model as models
    from peft.tuners import tuners_utils
    from peft.tuners.lora import LoraModel
    from peft.utils import save_and_load

    from pyparallel.models.adapters.saved import save_whole, whole_if_joined

    LoraModel._create_new_module = staticmethod(_around_the_cut(LoraModel._create_new_module))
    LoraModel._prepare_model = _of_transformers(LoraModel._prepare_model)
    LoraModel._check_add_weighted_adapter = _of_columns(LoraModel._check_add_weighted_adapter)
    tuners_utils._maybe_include_all_linear_layers = _with_parallel_layers(
        tuners_utils._maybe_include_all_linear_layers
    )
    save_and_load.has_valid_embedding_base_layer = _or_cut(
        save_and_load.has_valid_embedding_base_layer
    )
    PeftModelForCausalLM.forward = _of_stages(PeftModelForCausalLM.forward)
    models.get_peft_model_state_dict = whole_if_joined(models.get_peft_model_state_dict)
    PeftModel.save_pretrained = save_whole(PeftModel.save_pretrained)


def _of_transformers(theirs: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(theirs)
    def prepare(self: nn.Module, peft_config: Any, model: nn.Module) -> None:
        if isinstance(model, Decoder):
            raise ValueError(
                "get_peft_model: expected a transformers model, got the library's own Decoder; load it "
                "with pyparallel.load(path, mesh, transformers=True)"
            )
        theirs(self, peft_config, model)

    return prepare


def _around_the_cut(theirs: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(theirs)
    def create(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if not isinstance(target, ShardedModule):
            return theirs(lora_config, adapter_name, target, **kwargs)
        from pyparallel.models.adapters.lora import adopt

        check_config(lora_config, is_cut=True)
        layer = theirs(lora_config, adapter_name, _shown(target), **kwargs)
        adopt(layer, target)
        return layer

    return create


def _shown(twin: ShardedModule) -> nn.Module:
    """The dense module of a twin, without memory."""
    shape, weight = twin.dense_shapes["weight"], twin.weight
    if isinstance(twin, VocabParallelEmbedding):
        dense = nn.Embedding(*shape, padding_idx=twin.padding_idx, device="meta")
    elif isinstance(twin, ColumnParallelConv1D | RowParallelConv1D):
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            dense = Conv1D(twin.nf, twin.nx)
    else:
        dense = nn.Linear(shape[1], shape[0], bias=twin.bias is not None, device="meta")
    # peft looks where it lies, and puts the adapters there.
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    dense.weight = nn.Parameter(zero.expand(shape), requires_grad=False)
    return dense


def _of_columns(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def check(self: nn.Module, adapters: list[str], combination_type: str, svd_rank: Any) -> Any:
        cut = any(isinstance(module, ShardedModule) for module in self.modules())
        if cut and combination_type not in COMBINATIONS:
            raise ValueError(
                f"combination_type: expected {' or '.join(COMBINATIONS)} on a model that is cut, since "
                f"others look at whole matrices; got {combination_type!r}"
            )
        return theirs(self, adapters, combination_type, svd_rank)

    return check


def _with_parallel_layers(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def include(peft_config: Any, model: nn.Module) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        found = theirs(peft_config, model)
        if isinstance(asked, str) and asked.lower() == "all-linear":
            found.target_modules |= {
                name
                for name, module in model.named_modules()
                if type(module) in _LINEAR and not name.endswith(".base_layer")
            }
        return found

    return include


def _or_cut(theirs: Callable[[nn.Module], bool]) -> Callable[[nn.Module], bool]:
    @functools.wraps(theirs)
    def valid(layer: nn.Module) -> bool:
        return theirs(layer) or isinstance(getattr(layer, "base_layer", None), ShardedModule)

    return valid


def _of_stages(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def forward(self: nn.Module, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        model = self.get_base_model()
        if not isinstance(model, StageModel):
            return theirs(self, input_ids, *args, **kwargs)
        if hasattr(model.get_output_embeddings(), "modules_to_save"):
            raise ValueError(
                "modules_to_save: expected no head over several stages, got one; use LoRA on it, or pp=1"
            )
        return model(input_ids)

    return forward
