"""A decoder-only transformer of parallel modules: Llama, Mistral, Qwen2, Qwen3, GPT-2, GPT-NeoX.

It needs no transformers library. Legend: B sequences, S tokens of each in this call, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyparallel.group import Group
from pyparallel.layers import (
    LayerNorm,
    ParallelAttention,
    ParallelLMHead,
    ParallelMLP,
    RMSNorm,
    RotaryEmbedding,
    VocabParallelEmbedding,
)
from pyparallel.layers.kv_cache import KVCache
from pyparallel.layers.span import Span
from pyparallel.models.config import DecoderConfig


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
    ) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.attention_norm = _norm(config, device, dtype)
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
        )
        self.mlp_norm = _norm(config, device, dtype)
        self.mlp = ParallelMLP(
            config.hidden_size,
            config.intermediate_size,
            config.activation,
            config.mlp_bias,
            device,
            dtype,
            group=group,
        )

    def forward(self, x: Tensor, span: Span, cache: KVCache | None = None) -> Tensor:
        attended = self.attention(self.attention_norm(x), span=span, cache=cache)
        if self.parallel_residual:
            return x + attended + self.mlp(self.mlp_norm(x))
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """The whole model; this rank's shard of it.

    Args:
        config: the dense sizes.
        group: the tensor-parallel ranks.
    """

    def __init__(
        self,
        config: DecoderConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: Group,
    ) -> None:
        super().__init__()
        self.config = config
        self.group = group
        self.embedding = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, device=device, dtype=dtype, group=group
        )
        self.rotary = self.positions = None
        if config.rotary_dim:
            self.rotary = RotaryEmbedding(
                config.rotary_dim, config.rope_theta, config.rope_scaling, config.rope_factors
            )
        else:
            self.positions = nn.Embedding(
                config.max_positions, config.hidden_size, device=device, dtype=dtype
            )
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, self.rotary, device, dtype, group=group)
            for index in range(config.num_layers)
        )
        self.norm = _norm(config, device, dtype)
        self.head = ParallelLMHead(
            config.hidden_size, config.vocab_size, False, device, dtype, group=group
        )
        if config.tied:
            self.head.weight = self.embedding.weight

    @property
    def vocab_size(self) -> int:
        """V, dense."""
        return self.config.vocab_size

    @property
    def max_positions(self) -> int:
        """How many tokens a sequence may have."""
        return self.config.max_positions

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return self.config.stop_ids

    def new_cache(self, batch: int, length: int) -> list[KVCache]:
        """Empty caches, a layer each, for ``batch`` sequences of up to ``length`` tokens."""
        return [layer.attention.new_cache(batch, length) for layer in self.layers]

    def hidden(
        self, ids: Tensor, starts: Sequence[int], cache: list[KVCache] | None = None
    ) -> Tensor:
        """The normalised last hidden states [B, S, H] of ``ids [B, S]``.

        Args:
            starts: the position of each sequence's first token in this call.
            cache: holds the tokens before ``starts``, and gets these.
        """
        spans: dict[int | None, Span] = {}
        for window in set(self.config.windows):
            spans[window] = Span.of(
                starts, ids.shape[1], device=ids.device, rotary=self.rotary, window=window
            )
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions(next(iter(spans.values())).positions)
        for index, layer in enumerate(self.layers):
            span = spans[self.config.windows[index]]
            x = layer(x, span, None if cache is None else cache[index])
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """All logits [B, S, V] of ``ids [B, S]``, on every rank."""
        return self.head(self.hidden(ids, [0] * ids.shape[0]))


def _norm(
    config: DecoderConfig, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.hidden_size, config.norm_eps, device=device, dtype=dtype)
