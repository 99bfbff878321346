"""What lets :func:`pyparallel.generate` drive a parallelized transformers model.

Legend: B sequences, S tokens of each in this call, T slots of the cache, H hidden, V_r this rank's ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.group import Group
from pyparallel.layers.kv_cache import KVCache
from pyparallel.layers.parallel_lm_head import ParallelLMHead
from pyparallel.layers.span import Span
from pyparallel.models.generation import GenerationDefaults
from pyparallel.ops.next_token import Said, Sampling, sample
from pyparallel.ops.softcap import softcap

# Types whose generate() forgets its cache where the frequencies change.
RESTARTING = ("phi3", "phi4_multimodal", "phimoe")


class SlotLayer(CacheLayerMixin):
    """One layer's static cache, in which a token's slot is its position."""

    def __init__(self, batch: int, length: int) -> None:
        super().__init__()
        self.batch = batch
        self.length = length
        self.span: Span | None = None
        self._slots: KVCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room, once the local KV heads and their size are known."""
        _, num_kv_heads, _, head_dim = key_states.shape
        self._slots = KVCache(
            self.batch,
            num_kv_heads,
            self.length,
            head_dim,
            value_dim=value_states.shape[-1],
            device=key_states.device,
            dtype=key_states.dtype,
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store ``[B, G_r, S, D]``; return all slots up to the span's end."""
        if self._slots is None:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._slots.write(
            key_states.transpose(1, 2), value_states.transpose(1, 2), self.span
        )
        return keys.transpose(1, 2), values.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(slots that are seen, the first of them)."""
        return self.span.end, 0

    def get_seq_length(self) -> int:
        """The slots before this call's."""
        return 0 if self.span is None else int(self.span.positions[0, 0])

    def get_max_length(self) -> int:
        """All slots."""
        return self.length


class _Head:
    """Tokens from hidden states, without gathering the logits.

    Between the LM head and the logits some models divide, multiply, or squash them.
    """

    def __init__(self, head: ParallelLMHead, config: object) -> None:
        self._head = head
        self._factor = (getattr(config, "logit_scale", None) or 1.0) / (
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._cap = getattr(config, "final_logit_softcapping", None)

    def local_logits(self, x: Tensor) -> Tensor:
        """[..., V_r] of ``x [..., H]``."""
        return self._adjusted(self._head.local_logits(x))

    def _adjusted(self, logits: Tensor) -> Tensor:
        if self._factor != 1.0:
            logits = logits * self._factor
        return logits if self._cap is None else softcap(logits, self._cap)

    def sample(
        self, x: Tensor, sampling: Sampling, draws: Tensor, said: Said | None = None
    ) -> Tensor:
        """A drawn id [B] after each hidden state of ``x [B, H]``; temperature 0: the likeliest."""
        logits, start, group = self._head.logits_to_sample(x)
        logits = self._adjusted(logits)
        return sample(logits, sampling, draws, start=start, group=group, said=said)


class TransformersDecoder(nn.Module):
    """A parallelized causal language model of transformers.

    Attributes:
        model: the transformers model, whose own forward and generate work too.

    Raises:
        ValueError: it has no LM head that is cut, or its forward is not base model, then head, so that
            :func:`pyparallel.generate` can't drive it.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        super().__init__()
        self.model = model
        self.group = group
        head = model.get_output_embeddings()
        if not isinstance(head, ParallelLMHead):
            raise ValueError(
                f"{type(model).__name__}: expected an LM head that is cut, got {type(head).__name__}; "
                f"use the model's own generate()"
            )
        config = model.config.get_text_config(decoder=True)
        self.head = _Head(head, config)
        self.vocab_size: int = head.out_features
        self.max_positions: int = config.max_position_embeddings
        # What a checkpoint's generation_config.json says; load() reads it.
        self.generation: GenerationDefaults | None = None
        self._config = config
        # transformers reads the length off the largest position of a whole batch.
        kinds = [vars(m).get("rope_type", "") for m in model.modules()]
        named = {k for kind in kinds for k in (kind.values() if isinstance(kind, dict) else [kind])}
        if any("dynamic" in kind for kind in named):
            rope = getattr(config, "rope_parameters", None) or {}
            self.max_positions = int(self.max_positions * max(rope.get("factor") or 1.0, 1.0))
        self.rows_apart = any("dynamic" in kind or "longrope" in kind for kind in named)
        self._check_forward()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        if self.generation is not None and self.generation.stop_ids is not None:
            return self.generation.stop_ids
        stop = self._config.eos_token_id
        return () if stop is None else tuple(stop) if isinstance(stop, list) else (stop,)

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for ``batch`` sequences of up to ``length`` tokens."""
        layers = [SlotLayer(batch, length) for _ in range(self._config.num_hidden_layers)]
        return Cache(layers=layers)

    def hidden(self, ids: Tensor, starts: Sequence[int], cache: Cache | None = None) -> Tensor:
        """The last hidden states [B, S, H] of ``ids [B, S]``, whose rows begin at ``starts``."""
        if cache is not None and self.rows_apart:
            cache.seen, ids, starts, new = self._with_seen(cache, ids, starts)
            return self._hidden(ids, starts, cache)[:, -new:]
        return self._hidden(ids, starts, cache)

    def _with_seen(
        self, cache: Cache, ids: Tensor, starts: Sequence[int]
    ) -> tuple[Tensor, Tensor, Sequence[int], int]:
        """All tokens of a sequence; those of this call and where they begin; how many are new.

        Where a sequence grows beyond the length that its keys' frequencies were for, transformers
        forgets the cache of a Phi-3 and reads the sequence anew.
        """
        new, start = ids.shape[1], starts[0]
        seen = ids if start == 0 else torch.cat([cache.seen[:, :start], ids], 1)
        length = getattr(self._config, "original_max_position_embeddings", None)
        restarts = length is not None and self._config.model_type in RESTARTING
        if restarts and 0 < start <= length < start + new:
            return seen, seen, [0] * len(starts), new
        return seen, ids, starts, new

    def _hidden(self, ids: Tensor, starts: Sequence[int], cache: Cache | None) -> Tensor:
        span = Span.of(starts, ids.shape[1], device=ids.device)
        for layer in [] if cache is None else cache.layers:
            layer.span = span
        output = self.model.base_model(
            input_ids=ids,
            position_ids=span.positions,
            attention_mask=self._masks(span),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def last_hidden(
        self, ids: Tensor, lengths: Sequence[int], cache: Cache | None = None
    ) -> Tensor:
        """The hidden states [B, H] of the last tokens of prompts ``ids [B, S]``, padded on the right."""
        hidden = self.hidden(ids, [0] * len(lengths), cache)
        last = torch.tensor(lengths, device=ids.device) - 1
        return hidden[torch.arange(len(lengths), device=ids.device), last]

    def forward(self, ids: Tensor) -> Tensor:
        """All logits [B, S, V] of ``ids [B, S]``, on every rank."""
        return self.model(input_ids=ids, use_cache=False).logits

    def _masks(self, span: Span) -> Tensor | dict[str, Tensor]:
        """[B, 1, S, T], or one for each kind of layer where the model has several."""
        window = getattr(self._config, "sliding_window", None)
        kinds = getattr(self._config, "layer_types", None)
        if not kinds:
            return self._mask(span, window)
        windows = {"full_attention": None, "sliding_attention": window}
        unknown = set(kinds) - set(windows)
        if unknown:
            raise ValueError(f"layer_types: {min(unknown)!r} is not one that generate() can drive")
        return {kind: self._mask(span, windows[kind]) for kind in set(kinds)}

    def _mask(self, span: Span, window: int | None) -> Tensor:
        behind = span.positions.unsqueeze(-1) - torch.arange(span.end, device=span.positions.device)
        seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        seen = seen.unsqueeze(1)
        if self.model.config._attn_implementation != "eager":
            return seen
        dtype = self.model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
            ~seen, torch.finfo(dtype).min
        )

    @torch.inference_mode()
    def _check_forward(self) -> None:
        """The path that generates gives the logits of the model's own forward."""
        length = min(4, self.max_positions)
        ids = torch.arange(length, device=self.model.device).unsqueeze(0) % self.vocab_size
        cache = self.new_cache(1, length)
        steps = [self.hidden(ids[:, :1], [0], cache)]
        if length > 1:
            steps.append(self.hidden(ids[:, 1:], [1], cache))
        ours = self.head.local_logits(torch.cat(steps, 1))
        sharding = self.model.get_output_embeddings().shardings["weight"].along(-1)
        truth = sharding.split(self(ids), self.group.rank)
        error = (ours - truth).float().abs().amax(-1).amax().nan_to_num(torch.inf)
        worst = all_reduce_raw(
            torch.stack([error, truth.float().abs().amax()]), self.group, op="max"
        )
        # Two ways to round one computation: they agree in half of the digits at the least.
        if float(worst[0]) > torch.finfo(truth.dtype).eps ** 0.5 * float(worst[1]):
            raise ValueError(
                f"{type(self.model).__name__}: its logits are not its head's of its hidden states; "
                f"use the model's own generate()"
            )
