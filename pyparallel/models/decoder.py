"""A decoder-only transformer of parallel modules: Llama, Mistral, Qwen2, Qwen3, GPT-2, GPT-NeoX.

It needs no transformers library. Legend: B sequences, S tokens of each in this call, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyparallel.comm.group import Group
from pyparallel.comm.sequence import sequence_sizes, split_sequence
from pyparallel.layers import ParallelLMHead, RotaryEmbedding, VocabParallelEmbedding
from pyparallel.layers.kv_cache import KVCache
from pyparallel.layers.span import Span
from pyparallel.models.config import DecoderConfig
from pyparallel.models.decoder_layer import DecoderLayer, drop_tokens
from pyparallel.models.decoder_norm import norm_of
from pyparallel.models.generation import GenerationDefaults
from pyparallel.models.stage import Layers, Stage
from pyparallel.models.whole_call import draw_seed

RECOMPUTE = ("none", "attention", "layers")


class Decoder(nn.Module):
    """The whole model, or one stage of it; this rank's shard of that.

    A stage that is not the first takes hidden states [B, S, H] for ids (with ``sequence_parallel`` this
    rank's tokens of them), and one that is not the last returns such hidden states.

    Args:
        config: the dense sizes.
        group: the tensor-parallel ranks.
        stage: which layers, by default all; see :mod:`pyparallel.models.stage`.
        sequence_parallel: between the matmuls each rank holds its tokens alone: 1/R of the
            activations. A call needs as many tokens as ranks.
        recompute: what backward computes again instead of keeping it: "none"; "attention", all
            between q, k, v and the output projection (selective recomputation, Korthikanti et al.
            2022, section 5); "layers", everything but the layers' inputs.

    Raises:
        ValueError: another recompute.
    """

    def __init__(
        self,
        config: DecoderConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: Group,
        stage: Stage | None = None,
        sequence_parallel: bool = False,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute: expected one of {RECOMPUTE}, got {recompute!r}")
        self.config = config
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.recompute = recompute
        self.stage = stage or Stage.whole(config.num_layers)
        options = {"device": device, "dtype": dtype}
        on_shards = {"group": group, "sequence_parallel": sequence_parallel}
        self.embedding = self.rotary = self.positions = self.norm = self.head = None
        if self.stage.is_first:
            self.embedding = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, config.padding_id, **options, **on_shards
            )
        if config.rotary_dim:
            self.rotary = RotaryEmbedding(
                config.rotary_dim, config.rope_theta, config.rope_scaling, config.rope_factors
            )
        elif self.stage.is_first:
            self.positions = nn.Embedding(config.max_positions, config.hidden_size, **options)
        self.layers = Layers(
            (
                DecoderLayer(
                    config, index, self.rotary, **options, **on_shards, recompute=recompute
                )
                for index in self.stage.layers
            ),
            self.stage.layers,
        )
        if self.stage.is_last:
            self.norm = norm_of(config, device, dtype, group, sequence_parallel)
            self.head = ParallelLMHead(
                config.hidden_size, config.vocab_size, False, **options, **on_shards
            )
        # Which of the replicas of dp this is, and the ranks of the other stages; load() says.
        self.replica = 0
        self.pipeline: Group | None = None
        # What a checkpoint's generation_config.json says; load() reads it.
        self.generation: GenerationDefaults | None = None
        self.tied_copies: dict[str, str] = {}
        if config.tied and self.stage.is_last and not self.stage.is_first:
            self.tied_copies["head.weight"] = "embedding.weight"
        self.tie()

    def tie(self) -> None:
        """Make a tied head's weight the embedding's, where this stage has both."""
        if self.config.tied and self.stage.is_first and self.stage.is_last:
            self.head.share_weight(self.embedding)

    def meta_twin(self) -> Decoder:
        """What its config and ranks describe, without memory for weights."""
        return type(self)(self.config, "meta", **self._cut())

    def _cut(self) -> dict[str, Any]:
        """The arguments that say how it lies on the ranks."""
        return {
            "group": self.group,
            "stage": self.stage,
            "sequence_parallel": self.sequence_parallel,
            "recompute": self.recompute,
        }

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """The weight that this stage shares with another one, if there is such."""
        if not self.config.tied or self.stage.count == 1:
            return None
        if self.stage.is_first:
            return self.embedding.weight
        return self.head.weight if self.stage.is_last else None

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
        told = None if self.generation is None else self.generation.stop_ids
        return self.config.stop_ids if told is None else told

    @property
    def drops(self) -> bool:
        """Whether a call drops anything now."""
        config = self.config
        rates = config.embedding_dropout, config.attention_dropout, config.hidden_dropout
        return self.training and any(rates)

    @property
    def rows_apart(self) -> bool:
        """Whether a prompt's answer depends on what else is in its batch."""
        return self.rotary is not None and self.rotary.depends_on_length

    def own_tokens(self, length: int) -> int:
        """How many of a sequence's ``length`` tokens a stage hands to the next one on this rank."""
        return (
            sequence_sizes(length, self.group)[self.group.rank]
            if self.sequence_parallel
            else length
        )

    def new_cache(self, batch: int, length: int) -> list[KVCache]:
        """Empty caches, a layer each, for ``batch`` sequences of up to ``length`` tokens.

        Raises:
            ValueError: the model is sequence-parallel.
        """
        self._check_cacheable()
        return [layer.attention.new_cache(batch, length) for layer in self.layers]

    def _check_cacheable(self) -> None:
        if self.sequence_parallel:
            raise ValueError(
                "sequence_parallel: expected False for a model with a cache, since a step of one "
                "token cannot be cut; load the same weights without it to generate"
            )

    def hidden(
        self,
        ids: Tensor,
        starts: Sequence[int],
        cache: list[KVCache] | None = None,
        *,
        length: int | None = None,
    ) -> Tensor:
        """The normalised last hidden states [B, S, H] of ``ids [B, S]``; with ``sequence_parallel``
        this rank's tokens of them.

        Args:
            starts: the position of each sequence's first token in this call.
            cache: holds the tokens before ``starts``, and gets these.
            length: S, where a stage is given shards.
        """
        spans: dict[int | None, Span] = {}
        for window in set(self.config.windows):
            spans[window] = Span.of(
                starts,
                length or ids.shape[1],
                device=ids.device,
                rotary=self.rotary,
                window=window,
            )
        return self._run(ids, spans, cache)

    def last_hidden(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        cache: list[KVCache] | None = None,
    ) -> Tensor:
        """The hidden states [B, H] of the last tokens of prompts ``ids [B, S]``, padded on the right.

        Args:
            lengths: without the padding; the longest has none.
            cache: empty; gets the prompts.
        """
        hidden = self.hidden(ids, [0] * len(lengths), cache)
        last = torch.tensor(lengths, device=ids.device) - 1
        return hidden[torch.arange(len(lengths), device=ids.device), last]

    def _run(self, x: Tensor, spans: dict[int | None, Span], cache: list[KVCache] | None) -> Tensor:
        """The layers over the tokens of a call; ``spans`` by the layers' windows."""
        if self.embedding is not None:
            x = self.embedding(x)
        if self.positions is not None:
            positions = self.positions(next(iter(spans.values())).positions)
            # Looked up whole and then cut, so that every rank has the whole gradient of the table.
            if self.sequence_parallel:
                positions = split_sequence(positions, self.group)
            x = x + positions
        if self.drops:
            seed = draw_seed() + torch.tensor(0x5851F42D4C957F2D) * self.replica
            spans = {window: replace(span, seed=seed) for window, span in spans.items()}
            if self.stage.is_first:
                rate, span = self.config.embedding_dropout, next(iter(spans.values()))
                x = drop_tokens(x, rate, span, 0, self.group, self.sequence_parallel)
        for place, (index, layer) in enumerate(zip(self.stage.layers, self.layers, strict=True)):
            span = spans[self.config.windows[index]]
            held = None if cache is None else cache[place]
            if self.recompute == "layers" and torch.is_grad_enabled():
                x = checkpoint(layer, x, span, held, use_reentrant=False)
            else:
                x = layer(x, span, held)
        return x if self.norm is None else self.norm(x)

    def forward(self, ids: Tensor, *, length: int | None = None) -> Tensor:
        """All logits [B, S, V] of ``ids [B, S]``, on every rank.

        Args:
            length: S, where a stage is given shards.
        """
        length = length or ids.shape[1]
        hidden = self.hidden(ids, [0] * ids.shape[0], length=length)
        return hidden if self.head is None else self.head(hidden, length=length)
