"""A transformers model whose sequences are cut over context-parallel ranks.

Every rank calls the model with the same whole sequences. At its door they are cut: ids, embeddings,
token types, positions and labels become those of this rank's tokens, and attention, the one part that
looks at other tokens, runs over the ranks. The logits and hidden states that come out are this rank's;
the loss is that of all tokens, on every rank, and its gradients are this rank's part.

    loss = (sum over ranks of the sum over own targets of l) / number of all targets

Legend: B sequences, S tokens of each, S_r this rank's, N_r and G_r heads of this tp rank, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyparallel.comm.collectives import all_reduce
from pyparallel.comm.context import ContextShards, check_length
from pyparallel.comm.group import Group
from pyparallel.models.swap.own_attention import OTHER
from pyparallel.models.whole_call import WholeCall, see_whole_calls
from pyparallel.ops.context.attention import context_parallel_attention

NAME = "pyparallel_context"

# Causal models whose layers hand on what the call is given, down to attention, and look at other tokens
# nowhere else.
FAMILIES = (
    "cohere",
    "glm",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "starcoder2",
)
# A label that does not count, as in torch's cross_entropy.
IGNORE_INDEX = -100
# Arguments [B, S] that go with the tokens.
WITH_TOKENS = ("input_ids", "inputs_embeds", "token_type_ids")


class ContextRegion:
    """What happens at the door of a model; a call's shards travel through it among its arguments.

    Attributes:
        group: the context-parallel ranks.
        algorithm: "ring", "ulysses" or "auto".
    """

    def __init__(self, group: Group, algorithm: str) -> None:
        self.group = group
        self.algorithm = algorithm
        self.call = WholeCall()

    def enter(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the model: everything that has a place for each token is cut."""
        given = _named(model, args, kwargs)
        _check_call(given)
        tokens = [given[name] for name in WITH_TOKENS if given.get(name) is not None]
        if not tokens:
            raise ValueError("input_ids: expected ids [B, S] or inputs_embeds, got neither")
        length = tokens[0].shape[1]
        check_length(length, self.group)
        shards = ContextShards.of(
            length,
            self.group,
            documents=_documents(given, tokens[0]),
            algorithm=self.algorithm,
        )
        positions = given.get("position_ids")
        self.call.shards = shards
        if positions is None:
            self.call.last = torch.tensor(length - 1, device=tokens[0].device)
            given["position_ids"] = shards.positions(device=tokens[0].device)
        else:
            self.call.last = positions.max()
            given["position_ids"] = shards.split(positions)
        for name in WITH_TOKENS:
            if given.get(name) is not None:
                given[name] = shards.split(given[name])
        _cut_labels(given, shards)
        given |= {"attention_mask": None, "use_cache": False, "context_shards": shards}
        return (), given

    def leave(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Behind the model: the loss of all ranks' tokens."""
        self.call.last = None
        if output is None or kwargs.get("shift_labels") is None:
            return None
        if isinstance(output, tuple):
            return (all_reduce(output[0], self.group), *output[1:])
        output.loss = all_reduce(output.loss, self.group)
        return output


def context_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    context_shards: ContextShards | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query [B, N_r, S_r, D]``, ``key, value [B, G_r, S_r, D]`` to [B, S_r, N_r, D]."""
    if context_shards is None:
        raise ValueError(
            f"{type(module).__name__}: its context is cut over ranks, so call the model that "
            f"parallelize() was given, and not a part of it"
        )
    if dropout:
        raise ValueError(
            f"attention dropout: expected 0 where the context is cut over ranks, got {dropout}; set "
            f"it to 0 in the config"
        )
    other = [name for name in OTHER if kwargs.get(name)]
    if other:
        raise ValueError(f"{other[0]}: not known to attention whose context is cut over ranks")
    q, k, v = (t.transpose(1, 2).contiguous() for t in (query, key, value))
    o = context_parallel_attention(
        q, k, v, context_shards, causal=True, window=sliding_window, scale=scaling
    )
    return o, None


def cut_context(model: nn.Module, group: Group, algorithm: str, cores: Sequence[str]) -> None:
    """Let every call of ``model``, whose modules are cut already, work on this rank's tokens.

    Args:
        cores: its attention modules.
    """
    from transformers import AttentionInterface

    # A name that no mask is known for: none is built.
    AttentionInterface.register(NAME, context_attention)
    model.set_attn_implementation(NAME)
    region = ContextRegion(group, algorithm)
    see_whole_calls(model, region.call, cores)
    model.register_forward_pre_hook(region.enter, with_kwargs=True)
    model.register_forward_hook(region.leave, with_kwargs=True, always_call=True)


def check_context(model: nn.Module) -> None:
    """Raise where a model's calls can't be cut over ranks.

    Raises:
        ValueError: a family that is not known to work, or a model that is not the causal one.
    """
    kind, name = model.config.model_type, type(model).__name__
    if kind not in FAMILIES:
        raise ValueError(
            f"cp: expected 1 for a {kind} model, whose attention can't be cut over ranks; of "
            f"transformers' models these can: {', '.join(FAMILIES)}. Use tp and sequence_parallel=True"
        )
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"cp: expected 1 for a {name}, which looks at whole sequences behind its layers; only "
            f"causal language models can be cut over cp"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"cp: expected 1 for a {name} whose attention can't be replaced; update transformers"
        )


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(model.forward).parameters
    return dict(zip(names, args, strict=False)) | kwargs


def _check_call(given: dict[str, Any]) -> None:
    held = [name for name in ("past_key_values", "cache") if given.get(name) is not None]
    if held or given.get("use_cache"):
        raise ValueError(
            f"{held[0] if held else 'use_cache'}: expected none where the context is cut over ranks; "
            f"to generate, load the checkpoint with pyparallel.load, whose cache is cut too"
        )
    kept = given.get("logits_to_keep", 0)
    if isinstance(kept, Tensor) or kept:
        raise ValueError(
            f"logits_to_keep: expected 0 where the context is cut over ranks, got {kept}"
        )
    mask = given.get("attention_mask")
    if mask is None:
        return
    # Padding on the right is behind every token that counts, which a causal model does not see.
    if mask.dim() != 2 or not bool((mask[:, 1:] <= mask[:, :-1]).all()):
        raise ValueError(
            "attention_mask: expected None or [B, S] with padding on the right where the context is "
            "cut over ranks; documents packed into a sequence are told by position_ids that begin anew"
        )


def _documents(given: dict[str, Any], tokens: Tensor) -> Tensor | None:
    """Ids of the documents [B, S], which transformers tells by positions that begin anew."""
    positions = given.get("position_ids")
    if positions is None or given.get("attention_mask") is not None:
        return None
    begins = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=False)
    if not bool(begins.any()):
        return None
    return begins.long().cumsum(1).expand(tokens.shape[0], -1)


def _cut_labels(given: dict[str, Any], shards: ContextShards) -> None:
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if labels is None and shifted is None:
        return
    if shifted is None:
        # A token's next one may be another rank's: shifted whole, and then cut.
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if given.get("num_items_in_batch") is None:
        given["num_items_in_batch"] = (shifted != IGNORE_INDEX).sum()
    given["shift_labels"] = given["labels"] = shards.split(shifted).contiguous()
