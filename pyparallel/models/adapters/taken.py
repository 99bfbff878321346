"""The adapters of a model, taken off before it is cut and put back around its parallel layers."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyparallel.layers.parameters import ShardedModule
from pyparallel.models.adapters.configs import check_config
from pyparallel.models.swap.plans import parent_of
from pyparallel.models.swap.shared_parameter import GradientSummed, always_sum_gradients


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a ``PeftModel``; any other as it is.

    Raises:
        ValueError: an adapter is none that lies beside layers alone, as a prompt.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    kind = str(getattr(model.peft_type, "value", model.peft_type))
    if kind != "LORA":
        raise ValueError(f"parallelize: expected LoRA of a {type(model).__name__}, got {kind}")
    for config in model.peft_config.values():
        check_config(config, is_cut=False)
    return model.get_base_model()


@dataclass
class Taken:
    """What was taken off a model: peft's layers by the names of the modules they were around."""

    model: nn.Module
    layers: dict[str, Any]

    @classmethod
    def off(cls, model: nn.Module, context_ranks: int) -> Taken:
        """Take all of peft's layers off ``model``, whose sequences are to be cut over so many ranks.

        Raises:
            ValueError: one can't be cut; the message names it, and the model is as it was.
        """
        taken = cls(model, {})
        if "peft" not in sys.modules:
            return taken
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        known = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        found = {name: m for name, m in model.named_modules() if isinstance(m, known)}
        for name, layer in found.items():
            _check(name, layer, context_ranks)
        for name, layer in found.items():
            taken.layers[name] = layer
            _put(model, name, _inner(layer))
        return taken

    def back(self) -> None:
        """Put them back as they were."""
        for name, layer in self.layers.items():
            _put(self.model, name, layer)

    def around_the_cut(self) -> None:
        """Put them back around what stands in their places now; those of other stages are left out.

        Raises:
            ValueError: a layer with LoRA works on shards, and is not cut.
        """
        for name, layer in self.layers.items():
            now = _held(self.model, name)
            if now is not _inner(layer) and not isinstance(now, ShardedModule):
                continue
            _surround(name, layer, now)
            _put(self.model, name, layer)


def _check(name: str, layer: Any, context_ranks: int) -> None:
    from peft.tuners import lora
    from peft.utils.other import ModulesToSaveWrapper

    from pyparallel.models.adapters.lora import check_adapter

    if type(layer) is ModulesToSaveWrapper:
        if next(layer.original_module.children(), None) is not None:
            raise ValueError(
                f"{name}: modules_to_save: expected a module without modules of its own, got a "
                f"{type(layer.original_module).__name__}"
            )
        return
    if type(layer) not in (lora.Linear, lora.Embedding):
        kind = f"{type(layer).__module__.removeprefix('peft.')}.{type(layer).__name__}"
        raise ValueError(
            f"{name}: expected LoRA on a linear layer or an embedding, or modules_to_save, got "
            f"{kind}; merge it, or train it without parallelize"
        )
    for adapter in layer.lora_dropout:
        check_adapter(layer, adapter, context_ranks, name)


def _inner(layer: Any) -> nn.Module:
    return layer.original_module if hasattr(layer, "original_module") else layer.base_layer


def _surround(name: str, layer: Any, now: nn.Module) -> None:
    """Let ``layer`` hold what its module has become."""
    from pyparallel.models.adapters.lora import adopt

    summed = isinstance(now, GradientSummed)
    if not hasattr(layer, "original_module"):
        if summed:
            raise ValueError(
                f"{name}: has LoRA, and is not cut but works on shards; parallelize without "
                f"sequence_parallel"
            )
        if isinstance(now, ShardedModule):
            adopt(layer, now)
        return
    layer.original_module = now
    for adapter, trained in layer.modules_to_save.items():
        if summed:
            always_sum_gradients(trained, now.group)
        elif isinstance(now, ShardedModule):
            layer.modules_to_save[adapter] = copy.deepcopy(now).load_dense(trained)


def _held(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name; None where another stage of a pipeline has it."""
    return dict(model.named_modules(remove_duplicate=False)).get(name)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    setattr(model.get_submodule(parent_of(name)), name.rpartition(".")[2], module)
