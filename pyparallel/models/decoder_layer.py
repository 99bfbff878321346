"""One layer of the decoder, and what it drops in training.

Dropout's masks are functions of a call's seed and an element's place in the whole [B, S, H], or
[B, N, S, T] of attention's weights: they are the same at every number of tp, sp, cp and pp ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyparallel.comm.group import Group
from pyparallel.comm.sequence import sequence_sizes
from pyparallel.layers import ParallelAttention, ParallelMLP, RotaryEmbedding
from pyparallel.layers.kv_cache import KVCache
from pyparallel.layers.span import Span
from pyparallel.models.config import DecoderConfig
from pyparallel.models.decoder_norm import norm_of
from pyparallel.models.whole_call import drop

# Each layer has as many places that drop; place 0 is behind the embedding.
PLACES = 3


def drop_tokens(
    x: Tensor, p: float, span: Span, place: int, group: Group, sequence_parallel: bool
) -> Tensor:
    """``x [B, S_r, H]``, this rank's tokens, where the call of ``span`` drops."""
    if p == 0.0 or span.seed is None:
        return x
    length, first = span.positions.shape[1], 0
    if sequence_parallel:
        first = sum(sequence_sizes(length, group)[: group.rank])
    shards = None if span.context is None else getattr(span.context, "shards", None)
    return drop(x, p, shards, first, seed=span.seed_of(place), length=length)


class DecoderLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; with a parallel residual, both at once."""

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        rotary: RotaryEmbedding | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        group: Group,
        sequence_parallel: bool = False,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.attention_norm = norm_of(config, device, dtype, group, sequence_parallel)
        self.attention = ParallelAttention(
            config.hidden_size,
            config.num_heads,
            config.qkv_bias,
            device,
            dtype,
            group=group,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            out_bias=config.out_bias,
            causal=True,
            rotary=rotary,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            window=config.windows[index],
            sequence_parallel=sequence_parallel,
            recompute=recompute == "attention",
            dropout=config.attention_dropout,
            dropout_place=PLACES * index + 1,
        )
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.dropout = config.hidden_dropout
        self.place = PLACES * index + 2
        self.mlp_norm = norm_of(config, device, dtype, group, sequence_parallel)
        self.mlp = ParallelMLP(
            config.hidden_size,
            config.intermediate_size,
            config.activation,
            config.mlp_bias,
            device,
            dtype,
            group=group,
            sequence_parallel=sequence_parallel,
        )

    def forward(self, x: Tensor, span: Span, cache: KVCache | None = None) -> Tensor:
        length = span.positions.shape[1]
        normed = self.attention_norm(x)
        if self.parallel_residual:
            attended = self._drop(self.attention(normed, span=span, cache=cache), span, 0)
            return x + attended + self._drop(self.mlp(self.mlp_norm(x), length=length), span, 1)
        if self.dropout and span.seed is not None:
            x = x + self._drop(self.attention(normed, span=span, cache=cache), span, 0)
            return x + self._drop(self.mlp(self.mlp_norm(x), length=length), span, 1)
        after = x, self.mlp_norm
        normed, x = self.attention(normed, span=span, cache=cache, add_and_norm=after)
        return x + self.mlp(normed, length=length)

    def _drop(self, x: Tensor, span: Span, place: int) -> Tensor:
        group, sequence = self.group, self.sequence_parallel
        return drop_tokens(x, self.dropout, span, self.place + place, group, sequence)
