"""A decoder whose sequences are cut over context-parallel ranks.

Every rank holds the same weights (its tensor-parallel share of them) and works on its tokens: 1/R of the
activations, of the attention and of the KV cache.

Legend: B sequences, S tokens of each, S_r this rank's, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyparallel.comm.collectives import all_gather_raw, all_reduce_raw
from pyparallel.comm.context import ContextShards, check_length
from pyparallel.comm.group import Group
from pyparallel.layers.context_kv_cache import ContextKVCache
from pyparallel.layers.context_span import prefill_span, step_span
from pyparallel.models.config import DecoderConfig
from pyparallel.models.decoder import Decoder
from pyparallel.models.stage import Stage


class ContextDecoder(Decoder):
    """A :class:`Decoder` over the ranks of ``context`` too.

    Training: ``logits = model(ids)`` are those of this rank's tokens, so the loss is
    ``pyparallel.cross_entropy(logits, shards.split(targets), mesh)``. Every parameter's gradient is then
    this rank's part, and the dense one is the sum over ``context``: :func:`pyparallel.data_parallel`.

    Args:
        context: the context-parallel ranks; the others as in :class:`Decoder`.
        algorithm: "ring", "ulysses" or "auto".
    """

    def __init__(
        self,
        config: DecoderConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: Group,
        context: Group,
        algorithm: str = "auto",
        stage: Stage | None = None,
        sequence_parallel: bool = False,
        recompute: str = "none",
    ) -> None:
        super().__init__(
            config,
            device,
            dtype,
            group=group,
            stage=stage,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
        )
        self.context = context
        self.algorithm = algorithm

    def _cut(self) -> dict[str, Any]:
        return {**super()._cut(), "context": self.context, "algorithm": self.algorithm}

    def shards(self, length: int, *, documents: Any = None) -> ContextShards:
        """How sequences of ``length`` tokens are cut; ``documents`` as in :meth:`ContextShards.of`."""
        return ContextShards.of(length, self.context, documents=documents, algorithm=self.algorithm)

    def own_tokens(self, length: int) -> int:
        """How many of a sequence's ``length`` tokens a stage hands to the next one on this rank."""
        return super().own_tokens(self.shards(length).sizes[self.context.rank])

    def new_cache(self, batch: int, length: int) -> list[ContextKVCache]:
        """Empty caches, a layer each, for ``batch`` sequences of up to ``length`` tokens, of which
        each rank holds its part.

        Raises:
            ValueError: the model is sequence-parallel.
        """
        self._check_cacheable()
        return [
            layer.attention.new_cache(batch, length, context=self.context) for layer in self.layers
        ]

    def forward(
        self,
        ids: Tensor,
        shards: ContextShards | None = None,
        *,
        length: int | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The logits [B, S_r, V] of this rank's tokens of ``ids [B, S]``.

        Args:
            shards: from :meth:`shards`; by default each sequence is one document.
            length, documents: S, and document ids [B, S], where a stage is given no ``shards``.

        Raises:
            ValueError: fewer tokens than ranks.
        """
        shards = shards or self.shards(length or ids.shape[1], documents=documents)
        check_length(shards.length, self.context)
        hidden = self._prefill(ids, shards, None)
        if self.head is None:
            return hidden
        return self.head(hidden, length=shards.sizes[self.context.rank])

    def hidden(
        self,
        ids: Tensor,
        starts: Sequence[int],
        cache: list[ContextKVCache] | None = None,
        *,
        length: int | None = None,
    ) -> Tensor:
        """The normalised last hidden states [B, S, H] of ``ids [B, S]``, whole on every rank, without
        gradients; a stage that is not the last returns the next one's input, this rank's tokens.

        Args:
            starts: the position of each sequence's first token in this call; all 0 for the first call
                on a cache and without one.
            length: S, where a stage is given shards.
        """
        if cache is not None and cache[0].slots is not None:
            span = step_span(starts, ids.shape[1], cache[0], device=ids.device, rotary=self.rotary)
            return self._run(ids, dict.fromkeys(self.config.windows, span), cache)
        if any(starts):
            raise ValueError(
                f"starts: expected 0 for the first call of a cache, got {list(starts)}"
            )
        shards = self.shards(length or ids.shape[1])
        hidden = self._prefill(ids, shards, cache)
        if not self.stage.is_last:
            return hidden
        joined = all_gather_raw(hidden, self.context, dim=1, sizes=shards.sizes)
        order = shards.dense_order()
        return joined if order is None else joined[:, order.to(joined.device)]

    def last_hidden(
        self, ids: Tensor, lengths: Sequence[int], cache: list[ContextKVCache] | None = None
    ) -> Tensor:
        """The hidden states [B, H] of the prompts' last tokens; no rank holds those of all tokens."""
        shards = self.shards(max(lengths))
        hidden = self._prefill(ids, shards, cache)
        is_last = torch.tensor(lengths).unsqueeze(1) - 1 == shards.positions()
        rows, tokens = torch.nonzero(is_last, as_tuple=True)
        last = hidden.new_zeros(len(lengths), hidden.shape[-1])
        last[rows.to(hidden.device)] = hidden[rows, tokens]
        # One rank has it and the others add zeros: no rounding.
        return all_reduce_raw(last, self.context)

    def _prefill(
        self, ids: Tensor, shards: ContextShards, cache: list[ContextKVCache] | None
    ) -> Tensor:
        """The hidden states [B, S_r, H] of this rank's tokens."""
        span = prefill_span(
            ids.shape[0],
            shards,
            device=ids.device,
            rotary=self.rotary,
            cached=cache is not None,
        )
        own = shards.split(ids) if self.stage.is_first else ids
        return self._run(own, dict.fromkeys(self.config.windows, span), cache)
