"""A transformers model as one stage of a pipeline.

What another stage holds becomes a module without parameters: layers and the final norm hand their input
on, learned positions are zero, and hidden states enter as ``inputs_embeds``. Layers keep their numbers.
Whether a family can be cut so is tried out: with no layers of its own a stage must return its input.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pyparallel.layers.parameters import ShardedModule
from pyparallel.models.stage import Stage, partition
from pyparallel.models.swap.sequence_region import SequenceRegion


class Elsewhere(nn.Module):
    """A layer that another stage holds; it has the attributes that a model's forward asks layers for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if (
                not name.startswith("_")
                and name != "training"
                and not isinstance(value, (Tensor, nn.Module))
            ):
                setattr(self, name, value)
        # The stack's ends are where sequence parallelism cuts and gathers; an owner's hooks on the layer
        # run where the layer is.
        for hooks, told in (
            ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
            ("_forward_hooks", "_forward_hooks_with_kwargs"),
        ):
            for number, hook in getattr(layer, hooks).items():
                if isinstance(getattr(hook, "__self__", None), SequenceRegion):
                    getattr(self, hooks)[number] = hook
                    if number in getattr(layer, told):
                        getattr(self, told)[number] = True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _NoPositions(nn.Module):
    """Learned positions, which the first stage has added."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros(*position_ids.shape, self.hidden_size, device=position_ids.device)


class StageModel:
    """Mixed into a model's class: called with ids or hidden states, it returns a tensor."""

    stage: Stage
    tied_copies: dict[str, str]

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, S, H], or the logits [B, S, V], of ids [B, S] or hidden states."""
        given = {("input_ids" if self.stage.is_first else "inputs_embeds"): x, "use_cache": False}
        if self.stage.is_last:
            return super().forward(**given).logits
        return self.base_model(**given).last_hidden_state

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """The weight that this stage shares with another one, and that is trained, if there is such."""
        if not self._shares_embedding or not (self.stage.is_first or self.stage.is_last):
            return None
        first = self.stage.is_first
        module = self.get_input_embeddings() if first else self.get_output_embeddings()
        # What peft has put around it is trained on its own, and the weight inside is not.
        trained = isinstance(module, ShardedModule) and module.weight.requires_grad
        return module.weight if trained else None


@cache
def _stage_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Stage{kind.__name__}", (StageModel, kind), {})


def plan_stage(model: nn.Module, index: int, count: int) -> Stage:
    """Which layers of a dense transformers model stage ``index`` holds; the model is as it was.

    Raises:
        ValueError: fewer layers than stages, or a model that can't be cut by its layers.
    """
    layers = getattr(model.base_model, _stack(model))
    sizes = [float(sum(p.numel() for p in layer.parameters())) for layer in layers]
    head = model.get_output_embeddings()
    last = float(sum(p.numel() for p in head.parameters()))
    ranges = partition(sizes, count, last=last)
    _try_out(model)
    return Stage(index, count, ranges[index])


def cut_stage(model: nn.Module, stage: Stage) -> None:
    """Leave of ``model``, whose modules are cut over tp already, what ``stage`` holds; in place."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    model._shares_embedding = head.weight is embedding.weight
    model.stage = stage
    model.tied_copies = {}
    if model._shares_embedding and stage.is_last:
        model.tied_copies[f"{names[id(head)]}.weight"] = f"{names[id(embedding)]}.weight"
    _leave(model, stage.layers, first=stage.is_first, last=stage.is_last)
    if not stage.is_last:
        model.set_output_embeddings(nn.Identity())
    model.__class__ = _stage_class(type(model))


def _leave(model: nn.Module, numbers: range, *, first: bool, last: bool) -> dict[str, nn.Module]:
    """Put what stands for other stages' modules into the base model; the modules that stood there."""
    base, stack = model.base_model, _stack(model)
    embedding = model.get_input_embeddings()
    taken: dict[str, nn.Module] = {}

    def put(owner: nn.Module, name: str, module: nn.Module, path: str) -> None:
        taken[path] = getattr(owner, name)
        setattr(owner, name, module)

    before = True
    for name, child in list(base.named_children()):
        before = before and name != stack
        trained = next(child.parameters(), None) is not None
        if name == stack:
            for number, layer in enumerate(child):
                if number not in numbers:
                    put(child, str(number), Elsewhere(layer), f"{name}.{number}")
        elif before and not first and (trained or isinstance(child, nn.Dropout)):
            positions = isinstance(child, nn.Embedding) and child is not embedding
            none = _NoPositions(model.config.hidden_size) if positions else nn.Identity()
            put(base, name, none, name)
        elif not before and not last and trained:
            put(base, name, nn.Identity(), name)
    return taken


def _stack(model: nn.Module) -> str:
    """The name of the list of layers in the base model."""
    base = getattr(model, "base_model", model)
    lists = [name for name, child in base.named_children() if isinstance(child, nn.ModuleList)]
    head = model.get_output_embeddings()
    if len(lists) != 1 or not isinstance(head, nn.Module) or base is model:
        raise ValueError(
            f"pp: {type(model).__name__} can't be cut into stages; expected a language model with a "
            f"head, and one list of layers in its base model, got {', '.join(lists) or 'no list'} and "
            f"{type(head).__name__}; use pp=1, and tp or cp"
        )
    return lists[0]


@torch.no_grad()
def _try_out(model: nn.Module) -> None:
    """A stage that is neither end must, without layers of its own, hand on what it is given."""
    on_meta = model.device.type == "meta"
    device = torch.device("cpu") if on_meta else model.device
    config = model.config.get_text_config(decoder=True)
    x = torch.linspace(-1.0, 1.0, 3 * config.hidden_size, device=device)
    x = x.to(model.dtype).view(1, 3, -1)
    taken = _leave(model, range(0), first=False, last=False)
    # What has no memory gets some for this call: numbers that would show in the result.
    stand_ins = _materialize(model.base_model) if on_meta else []
    why = None
    try:
        y = model.base_model(inputs_embeds=x, use_cache=False).last_hidden_state
    except Exception as error:
        why = f"fails without layers of its own ({type(error).__name__}: {error})".splitlines()[0]
    finally:
        for owner, name, tensor in stand_ins:
            owner[name] = tensor
        for path, module in taken.items():
            owner, _, name = path.rpartition(".")
            setattr(model.base_model.get_submodule(owner), name, module)
    if why is not None:
        raise ValueError(
            f"pp: {type(model).__name__} {why}, which a stage has to do without; use pp=1, and tp or cp"
        )
    if not torch.equal(y, x):
        raise ValueError(
            f"pp: {type(model).__name__} changes its hidden states outside of its layers, which a "
            f"stage can't leave out; use pp=1, and tp or cp"
        )


def _materialize(base: nn.Module) -> list[tuple[dict[str, Tensor | None], str, Tensor]]:
    """Put tensors with memory in the places of those without; what stood there."""
    replaced = []
    for module in base.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_meta:
                    continue
                replaced.append((held, name, tensor))
                if tensor.is_floating_point():
                    value = torch.full(tensor.shape, 0.37, dtype=tensor.dtype)
                else:
                    value = torch.zeros(tensor.shape, dtype=tensor.dtype)
                held[name] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
    return replaced
