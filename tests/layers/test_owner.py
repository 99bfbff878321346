"""What from_dense and parallelize keep of a dense module's owner, and what they refuse in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from pyparallel.comm.group import Group
from pyparallel.comm.local_engine import LocalCommunicator
from pyparallel.cut.shard import features
from pyparallel.layers import (
    ColumnParallelLinear,
    ParallelAttention,
    ParallelLMHead,
    ParallelMLP,
    QKVParallelLinear,
    RowParallelLinear,
    SequenceParallelDropout,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    VocabParallelEmbedding,
)
from pyparallel.layers.owner import HOOKS
from pyparallel.models.swap.conv1d import RowParallelConv1D

# Shapes alone are looked at: no rank talks.
GROUP = Group(0, 2, LocalCommunicator())


def qkv(*parts: nn.Module) -> nn.Module:
    return QKVParallelLinear.from_dense(*parts, head_dim=2, group=GROUP)


def mlp(up: nn.Module, down: nn.Module, gate: nn.Module) -> nn.Module:
    return ParallelMLP.from_dense(up, down, gate, activation="swiglu", group=GROUP)


def conv(dense: nn.Module) -> nn.Module:
    return RowParallelConv1D.from_dense(dense, group=GROUP, sharding=features(8, 2))


# Name: (the dense modules, what makes the twin).
TWINS: dict[str, tuple[Callable[[], list[nn.Module]], Callable]] = {
    "column": (
        lambda: [nn.Linear(8, 6)],
        lambda d: ColumnParallelLinear.from_dense(d, group=GROUP),
    ),
    "row": (lambda: [nn.Linear(8, 6)], lambda d: RowParallelLinear.from_dense(d, group=GROUP)),
    "head": (lambda: [nn.Linear(8, 6)], lambda d: ParallelLMHead.from_dense(d, group=GROUP)),
    "embedding": (
        lambda: [nn.Embedding(9, 4)],
        lambda d: VocabParallelEmbedding.from_dense(d, group=GROUP),
    ),
    "qkv": (lambda: [nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)], qkv),
    "mlp": (lambda: [nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6)], mlp),
    "attention": (
        lambda: [nn.MultiheadAttention(8, 4, batch_first=True)],
        lambda d: ParallelAttention.from_dense(d, group=GROUP),
    ),
    "rms": (lambda: [nn.RMSNorm(8)], lambda d: SequenceParallelRMSNorm.from_dense(d, group=GROUP)),
    "layer norm": (
        lambda: [nn.LayerNorm(8)],
        lambda d: SequenceParallelLayerNorm.from_dense(d, group=GROUP),
    ),
    "conv1d": (lambda: [transformers.pytorch_utils.Conv1D(6, 8)], conv),
}


@pytest.mark.parametrize("name", TWINS)
def test_flags_dtype_and_mode_survive(name: str) -> None:
    build, twin_of = TWINS[name]
    for frozen in (False, True):
        for mode in (False, True):
            dense = [m.bfloat16().requires_grad_(not frozen).train(mode) for m in build()]
            twin = twin_of(*dense)
            assert {p.requires_grad for p in twin.parameters()} == {not frozen}, name
            assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}, name
            assert {m.training for m in twin.modules()} == {mode}, name
    meta = twin_of(*(m.to("meta") for m in build()))
    assert all(p.is_meta for p in meta.parameters()), name


def test_a_part_that_is_frozen_alone() -> None:
    dense = TWINS["qkv"][0]()
    dense[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"weight: .*query: True, key: False.*freeze all"):
        qkv(*dense)
    dense = TWINS["mlp"][0]()
    dense[2].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"bias: .*gate: False, up: True.*freeze all"):
        mlp(*dense)
    dense = [nn.Linear(8, 6), nn.Linear(6, 8, bias=False), nn.Linear(8, 6)]
    with pytest.raises(ValueError, match=r"bias: expected both of up and down"):
        mlp(*dense)
    dense = [nn.Linear(8, 8), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)]
    with pytest.raises(ValueError, match=r"bias: .*key: False"):
        qkv(*dense)
    # A frozen bias alone stays so.
    linear = nn.Linear(8, 6)
    linear.bias.requires_grad_(False)
    twin = ColumnParallelLinear.from_dense(linear, group=GROUP)
    assert twin.weight.requires_grad and not twin.bias.requires_grad


def add_hook(module: nn.Module, place: str) -> None:
    add = {
        "_forward_pre_hooks": lambda: module.register_forward_pre_hook(
            lambda *_: None, with_kwargs=True
        ),
        "_forward_hooks": lambda: module.register_forward_hook(lambda *_: None),
        "_backward_pre_hooks": lambda: module.register_full_backward_pre_hook(lambda *_: None),
        "_backward_hooks": lambda: module.register_full_backward_hook(lambda *_: None),
        "_state_dict_pre_hooks": lambda: module.register_state_dict_pre_hook(lambda *_: None),
        "_state_dict_hooks": lambda: module.register_state_dict_post_hook(lambda *_: None),
        "_load_state_dict_pre_hooks": lambda: module.register_load_state_dict_pre_hook(
            lambda *_: None
        ),
        "_load_state_dict_post_hooks": lambda: module.register_load_state_dict_post_hook(
            lambda *_: None
        ),
    }
    add[place]()


@pytest.mark.parametrize("name", [*TWINS, "dropout"])
def test_hooks_of_every_kind_are_told(name: str) -> None:
    if name == "dropout":
        build, twin_of = (lambda: [nn.Dropout(0.1)]), SequenceParallelDropout.from_dense
        twin_of = lambda d: SequenceParallelDropout.from_dense(d, group=GROUP)  # noqa: E731
    else:
        build, twin_of = TWINS[name]
    for place, kind in HOOKS.items():
        for index in range(len(build())):
            dense = build()
            add_hook(dense[index], place)
            with pytest.raises(ValueError, match=f"has {kind}, which would be lost") as caught:
                twin_of(*dense)
            assert "\n" not in str(caught.value)
    dense = build()
    dense[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"its forward was replaced"):
        twin_of(*dense)


def test_hooks_of_gradients_are_told() -> None:
    for add in ("register_hook", "register_post_accumulate_grad_hook"):
        linear = nn.Linear(8, 6)
        getattr(linear.weight, add)(lambda *_: None)
        with pytest.raises(ValueError, match=r"Linear.weight: has gradient hooks"):
            RowParallelLinear.from_dense(linear, group=GROUP)


MAKERS = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral_norm": nn.utils.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "pruning": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MAKERS)
def test_what_makes_a_parameter_from_others(name: str) -> None:
    """Refused over a shard, and of a module that is to be cut; free where nothing is cut."""
    for twin in (
        ColumnParallelLinear(8, 6, group=GROUP),
        RowParallelLinear(8, 6, group=GROUP),
    ):
        with pytest.raises(ValueError, match=r"weight: expected to stay a parameter"):
            MAKERS[name](twin)
    with pytest.raises(ValueError, match=r"parametrized|forward pre-hooks"):
        ColumnParallelLinear.from_dense(MAKERS[name](nn.Linear(8, 6)), group=GROUP)
    alone = MAKERS[name](ColumnParallelLinear(8, 6, group=Group.single()))
    assert alone(torch.ones(2, 8)).shape == (2, 6)


def test_parametrized_then_made_permanent() -> None:
    linear = parametrizations.spectral_norm(nn.Linear(8, 6))
    parametrize.remove_parametrizations(linear, "weight")
    ColumnParallelLinear.from_dense(linear, group=GROUP)
