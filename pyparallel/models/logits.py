"""The logits behind tokens that are known already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyparallel.generate import CausalLM


@torch.inference_mode()
def teacher_forced_logits(
    model: CausalLM, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> list[Tensor]:
    """For each prompt the fp32 logits [K, V] from which its K new tokens were chosen.

    One pass over the prompt and its tokens, without a cache; all ranks return all logits.
    """
    device = next(model.parameters()).device
    rows = []
    for prompt, new in zip(prompts, tokens, strict=True):
        ids = torch.tensor([[*prompt, *new[:-1]]], device=device)
        hidden = model.hidden(ids, [0], None)[0, len(prompt) - 1 :]
        rows.append(model.head(hidden).float().cpu())
    return rows
