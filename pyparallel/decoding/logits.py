"""The logits behind tokens that are known already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyparallel.decoding.decode_session import CausalLM
from pyparallel.decoding.stage_link import StageLink


@torch.inference_mode()
def teacher_forced_logits(
    model: CausalLM, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> list[Tensor]:
    """For each prompt the fp32 logits [K, V] from which its K new tokens were chosen.

    One pass over the prompt and its tokens, without a cache; all ranks return all logits.
    """
    device = next(model.parameters()).device
    stage = getattr(model, "stage", None)
    link = StageLink(model) if stage is not None and stage.count > 1 else None
    rows = []
    for prompt, new in zip(prompts, tokens, strict=True):
        ids = torch.tensor([[*prompt, *new[:-1]]], device=device)
        if link is None:
            hidden = model.hidden(ids, [0], None)[0, len(prompt) - 1 :]
            rows.append(model.head(hidden).float().cpu())
        else:
            rows.append(_through_stages(model, link, ids, len(prompt) - 1).cpu())
    return rows


def _through_stages(model: CausalLM, link: StageLink, ids: Tensor, first: int) -> Tensor:
    """The logits [K, V] from token ``first`` on of ``ids [1, S]``, on every stage."""
    length = ids.shape[1]
    x = ids
    if not link.stage.is_first:
        x = link.receive(1, model.own_tokens(length))
    hidden = model.hidden(x, [0], None, length=length)
    if link.stage.is_last:
        logits = model.head(hidden[0, first:]).float().contiguous()
    else:
        link.send(hidden)
        logits = torch.empty(length - first, model.vocab_size, device=ids.device)
    link.share(logits)
    return logits
