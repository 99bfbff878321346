"""generate() is the model's forward as the model is now: changed weights, hooks, other modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pyparallel.comm.group import Group
from pyparallel.decoding.cpu_decoder import reason_against
from pyparallel.decoding.generate import generate
from pyparallel.layers import RMSNorm
from pyparallel.layers.norm import HeadRMSNorm
from pyparallel.models.decoder import Decoder
from pyparallel.testing import run_ranks
from tests.decoding.test_cpu_decoder import CONFIGS, build

PROMPT = [5, 9, 2, 40, 33, 7]


def forward_tokens(model: Decoder, count: int) -> list[int]:
    """The likeliest tokens by whole forwards."""
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(PROMPT) :]


def made(model: Decoder, count: int = 4) -> list[int]:
    return generate(model, [PROMPT], max_new_tokens=count, stop_ids=[]).tokens[0]


def scale_data(model: Decoder) -> None:
    model.norm.weight.data.mul_(-3)


def scale_view(model: Decoder) -> None:
    model.layers[1].attention_norm.weight.detach()[::2].neg_()


def scale_in_inference(model: Decoder) -> None:
    with torch.inference_mode():
        model.layers[0].mlp_norm.weight.data.mul_(-2)


def scale_numpy(model: Decoder) -> None:
    """Behind torch's back."""
    bits = model.norm.weight.data.view(
        torch.int16 if model.norm.weight.itemsize == 2 else torch.int32
    )
    bits.numpy()[::2] ^= -(1 << (15 if bits.dtype is torch.int16 else 31))


def scale_bias(model: Decoder) -> None:
    model.layers[0].attention.qkv_proj.bias.data.add_(3)


def change_matrix(model: Decoder) -> None:
    model.layers[0].mlp.down_proj.weight.data.mul_(-5)


def other_parameter(model: Decoder) -> None:
    model.norm.weight = nn.Parameter(-model.norm.weight.detach())


CHANGES = [
    scale_data,
    scale_view,
    scale_in_inference,
    scale_numpy,
    scale_bias,
    change_matrix,
    other_parameter,
]


def weights(group: Group) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = build(CONFIGS["windows and biases"], group, dtype)
        # fp32 activations beside bf16 ones may choose another token of two alike; the first is clear.
        for change in CHANGES:
            before = made(model, 1)
            change(model)
            assert reason_against(model) is None
            after = made(model, 1)
            fresh = build(CONFIGS["windows and biases"], group, dtype)
            fresh.load_state_dict(model.state_dict())
            assert after == made(fresh, 1), f"{change.__name__} {dtype}"
            if dtype == torch.float32:
                assert after == forward_tokens(model, 1), change.__name__
            if change in (scale_data, other_parameter, scale_numpy):
                assert after != before, f"{change.__name__} {dtype}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_change_of_a_weight_is_seen(ranks: int) -> None:
    run_ranks(weights, ranks)


class Flipped(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)


def negate(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return -output


def flip_norm(model: Decoder) -> None:
    norm = Flipped(72, 1e-5)
    norm.weight = model.norm.weight
    model.norm = norm


def patch(model: Decoder) -> None:
    mlp = model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x, **options: -plain(x, **options)


def before_norm(model: Decoder) -> None:
    model.layers[0].mlp_norm.register_forward_pre_hook(lambda _, args: (-args[0],))


def norm_heads(model: Decoder) -> None:
    attention = model.layers[0].attention
    attention.q_norm, attention.k_norm = (HeadRMSNorm(24, 1e-5, group=model.group) for _ in "qk")


# Name: (what its owner does, what the decoder says of it).
OWNERS: dict[str, tuple[Callable[[Decoder], object], str]] = {
    "embedding": (
        lambda m: m.embedding.register_forward_hook(negate),
        "embedding has forward hooks",
    ),
    "mlp": (lambda m: m.layers[1].mlp.register_forward_hook(negate), "mlp has forward hooks"),
    "pre": (before_norm, "mlp_norm has forward pre-hooks"),
    "out": (
        lambda m: m.layers[0].attention.out_proj.register_forward_hook(negate),
        "out_proj has forward hooks",
    ),
    "down": (
        lambda m: m.layers[0].mlp.down_proj.register_forward_hook(negate),
        "down_proj has forward hooks",
    ),
    "up": (
        lambda m: m.layers[0].mlp.up_proj.register_forward_hook(negate),
        "up_proj has forward hooks",
    ),
    "head": (lambda m: m.head.register_forward_hook(negate), "head has forward hooks"),
    "norm": (lambda m: m.norm.register_forward_hook(negate), "norm has forward hooks"),
    "replaced": (flip_norm, "norm is a Flipped"),
    "identity": (lambda m: setattr(m.layers[0], "attention_norm", nn.Identity()), "is a Identity"),
    "patched": (patch, "mlp.forward is not"),
    "epsilon": (lambda m: setattr(m.layers[0].attention_norm, "eps", 1e3), "attention_norm.eps"),
    "window": (lambda m: setattr(m.layers[0].attention, "window", 2), "attention.window"),
    "activation": (lambda m: setattr(m.layers[0].mlp, "activation", "geglu"), "mlp.activation"),
    "head norm": (norm_heads, "is not what its config describes"),
}


def owners(group: Group) -> None:
    plain = made(build(CONFIGS["llama"], group))
    changed = 0
    for name, (act, words) in OWNERS.items():
        model = build(CONFIGS["llama"], group)
        made(model)
        act(model)
        reason = reason_against(model)
        assert reason is not None and words in reason, f"{name}: {reason}"
        tokens = made(model)
        assert tokens == forward_tokens(model, 4), name
        changed += tokens != plain
    assert changed > len(OWNERS) // 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_an_owner_has_added_runs(ranks: int) -> None:
    run_ranks(owners, ranks)


def test_a_method_replaced_on_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CONFIGS["llama"], Group.single())
    forward = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: -forward(self, x))
    assert "a method of RMSNorm was replaced" in reason_against(model)
    assert made(model) == forward_tokens(model, 4)


def test_what_runs_around_the_whole_model() -> None:
    model = build(CONFIGS["llama"], Group.single())
    handle = model.register_forward_hook(negate)
    with pytest.raises(ValueError, match="without forward hooks"):
        made(model)
    handle.remove()
    made(model)
