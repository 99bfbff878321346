"""What the tests of adapters share: models with LoRA, and what the dense run gives.

All of it is computed in fp64. TOLERANCE, of a tensor's largest element, is what roundings one behind the
other may add up to: sums of at most 128 terms, and some 80 operations deep (two layers and the loss)
forward and twice as many backward. fp32 anywhere would be 10^4 times as far off.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn

from pyparallel.testing import SEED, UNIT_ROUNDOFF, assert_within
from tests.orders import Exact
from tests.transformers_models import build, inputs

TOLERANCE = 128 * (80 + 160) * UNIT_ROUNDOFF[torch.float64]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
# Every linear role, embeddings and heads, tied ones too; by family, with the options of LoraConfig.
CASES: dict[str, dict] = {
    "llama": {"target_modules": "all-linear", "lora_dropout": 0.25, "use_rslora": True},
    "llama tied": {
        "target_modules": ["embed_tokens", "lm_head", "k_proj", "down_proj"],
        "bias": "lora_only",
    },
    "qwen3": {"target_modules": ["q_proj", "v_proj", "o_proj"], "modules_to_save": ["lm_head"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "lora_dropout": 0.25},
    "gpt_neox": {"target_modules": "all-linear", "bias": "all"},
    "phi3": {"target_modules": "all-linear", "rank_pattern": {"qkv_proj": 3}},
    "qwen2": {"target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]},
    "gemma3": {"target_modules": ["embed_tokens", "up_proj"], "modules_to_save": ["norm"]},
}
SEQUENCE = ("llama", "gpt_neox")


def config_of(name: str, **changes: object) -> peft.LoraConfig:
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **CASES[name], **changes}
    return peft.LoraConfig(**copy.deepcopy(options))


def base_of(name: str, **changes: object) -> nn.Module:
    model = build(name, **changes).double()
    model.config.dtype = torch.float64
    return model


def adapted(name: str, model: nn.Module | None = None, **changes: object) -> nn.Module:
    """A model whose adapters do something: B is not 0. The same in every process."""
    model = peft.get_peft_model(
        base_of(name, **changes) if model is None else model, config_of(name)
    )
    generator = torch.Generator().manual_seed(SEED + 11)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(value * 0.2)
    return model


def step(model: nn.Module, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, logits and gradients in training, with dropout as torch's generator gives it."""
    torch.manual_seed(SEED + 5)
    with Exact():
        output = model.train()(**x)
        output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **grads}


def near(actual: Tensor, truth: Tensor, what: str, whole: Tensor | None = None) -> None:
    largest = float((truth if whole is None else whole).abs().max())
    assert_within(actual, truth, TOLERANCE * largest, what)


@dataclass(frozen=True)
class Truth:
    """What the dense run gives.

    Attributes:
        step: loss, logits and gradients by name. tokens: what it generates.
        logits, told: logits and tokens of the merged model.
    """

    step: dict[str, Tensor]
    tokens: Tensor
    logits: Tensor
    told: Tensor


def truth_of(name: str) -> Truth:
    found = step(adapted(name), inputs(base_of(name)))
    return Truth(found, *ends(adapted(name)))


def ends(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens before merging, logits and tokens behind it."""
    ids = inputs(model)["input_ids"][:1, :5]
    tokens = model.eval().generate(input_ids=ids, **GREEDY)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with Exact(), torch.inference_mode():
        logits = merged(ids).logits
    return tokens, logits, merged.generate(ids, **GREEDY)
