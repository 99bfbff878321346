"""Self-attention with its heads cut over the ranks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyparallel import autocast, backend
from pyparallel.comm.group import Group
from pyparallel.comm.group_of import GroupLike, group_of
from pyparallel.comm.sequence import shard_sizes
from pyparallel.layers.context_kv_cache import ContextKVCache
from pyparallel.layers.kv_cache import KVCache
from pyparallel.layers.norm import HeadRMSNorm
from pyparallel.layers.owner import check_replaceable
from pyparallel.layers.qkv_parallel_linear import QKVParallelLinear
from pyparallel.layers.rotary_embedding import RotaryEmbedding
from pyparallel.layers.row_parallel_linear import RowParallelLinear
from pyparallel.layers.span import Span
from pyparallel.ops.attention_dropout import attention_with_dropout


class ParallelAttention(nn.Module):
    """``y = concat_n(softmax(scale q_n k_g^T) v_g) Wo^T`` over this rank's heads, summed over ranks.

    Multi-head, grouped-query and multi-query attention; the unit that is cut is a KV head with its
    query heads, and KV heads are replicated where there are fewer of them than ranks.

    Args:
        embed_dim, num_heads, bias, device, dtype: as in ``nn.MultiheadAttention``; dense sizes.
        group: the ranks; torch's own objects are taken too.
        num_kv_heads: by default ``num_heads``.
        head_dim: D; by default ``embed_dim // num_heads``.
        out_bias: whether the output projection adds a bias; by default as ``bias``.
        causal: a token sees itself and what came before.
        rotary: rotates queries and keys by their positions.
        qk_norm_eps: RMS-normalise each head's queries and keys first (Qwen3), with this epsilon.
        window: how many tokens, itself included, a token sees.
        sequence_parallel: x and y are this rank's tokens.
        recompute: keep q, k and v for backward, not what comes of them, and compute it again.
        dropout, dropout_place: what a span with a seed drops of the weights, and its number among the
            model's places that drop.

    Shapes:
        x, y [B, S, H], replicated, or [B, S_r, H] with ``sequence_parallel``.

    Communication: one all-reduce forward, one backward. With ``sequence_parallel`` one all-gather and
    one reduce-scatter forward; two all-gathers and one reduce-scatter backward.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: GroupLike,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_bias: bool | None = None,
        causal: bool = False,
        rotary: RotaryEmbedding | None = None,
        qk_norm_eps: float | None = None,
        window: int | None = None,
        sequence_parallel: bool = False,
        recompute: bool = False,
        dropout: float = 0.0,
        dropout_place: int = 0,
    ) -> None:
        super().__init__()
        group = group_of(group)
        self.dropout = dropout
        self.dropout_place = dropout_place
        self.causal = causal
        self.window = window
        self.rotary = rotary
        self.sequence_parallel = sequence_parallel
        self.recompute = recompute
        self.qkv_proj = QKVParallelLinear(
            embed_dim,
            num_heads,
            num_kv_heads,
            head_dim,
            bias,
            device,
            dtype,
            group=group,
            sequence_parallel=sequence_parallel,
        )
        layout, head_dim = self.qkv_proj.layout, self.qkv_proj.head_dim
        self.out_proj = RowParallelLinear(
            num_heads * head_dim,
            embed_dim,
            bias if out_bias is None else out_bias,
            device,
            dtype,
            group=group,
            sharding=layout.query_sharding(head_dim, dim=1),
            sequence_parallel=sequence_parallel,
        )
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            options = {"group": group, "device": device, "dtype": dtype}
            self.q_norm = HeadRMSNorm(head_dim, qk_norm_eps, **options)
            self.k_norm = HeadRMSNorm(head_dim, qk_norm_eps, **options)

    @classmethod
    def from_dense(
        cls, attention: nn.MultiheadAttention, *, group: GroupLike, **options
    ) -> ParallelAttention:
        """The parallel twin of torch's self-attention; ``options`` as in the constructor.

        Raises:
            ValueError: the module has what this one has not (dropout, other key or value sizes,
                added bias or zero attention), or takes its batch second.
        """
        check_replaceable(attention)
        for name, wanted in (
            ("dropout", 0.0),
            ("batch_first", True),
            ("add_zero_attn", False),
            ("bias_k", None),
            ("_qkv_same_embed_dim", True),
        ):
            if getattr(attention, name) != wanted:
                raise ValueError(
                    f"{name.lstrip('_')}: expected {wanted}, got {getattr(attention, name)}"
                )
        module = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.in_proj_bias is not None,
            "meta",
            attention.in_proj_weight.dtype,
            group=group,
            **options,
        )
        dense = {"weight": attention.in_proj_weight, "bias": attention.in_proj_bias}
        module.qkv_proj.load_dense(dense)
        module.out_proj.load_dense(attention.out_proj)
        return module.train(attention.training)

    def new_cache(
        self, batch: int, length: int, *, context: Group | None = None
    ) -> KVCache | ContextKVCache:
        """An empty cache of ``length`` slots for this rank's KV heads; with ``context`` its ranks each
        have their part of the slots."""
        start, stop = self.qkv_proj.layout.kv[self.qkv_proj.group.rank]
        weight = self.qkv_proj.weight
        sizes = (batch, stop - start, length, self.qkv_proj.head_dim)
        options = {"device": weight.device, "dtype": self.qkv_proj.dtype}
        if context is not None:
            return ContextKVCache(*sizes, group=context, **options)
        return KVCache(*sizes, **options)

    def forward(
        self,
        x: Tensor,
        *,
        span: Span | None = None,
        cache: KVCache | ContextKVCache | None = None,
        mask: Tensor | None = None,
        length: int | None = None,
        add_and_norm: tuple[Tensor, nn.Module] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend over ``x``, and over what ``cache`` holds.

        Args:
            span: where x's tokens stand; by default from position 0 on.
            cache: gets x's keys and values, and gives those before them.
            mask: [B, 1 or N_r, S, T], true where a token sees another; joined with ``causal``.
            length: S, with ``sequence_parallel`` and without a span; by default all shards are as
                long as this one.
            add_and_norm: a residual r and a norm; the result is then ``(norm(r + y), r + y)``.
        """
        if span is None:
            tokens = x.shape[1]
            if self.sequence_parallel:
                tokens = sum(shard_sizes(x, length, self.qkv_proj.group))
            span = Span.of([0] * x.shape[0], tokens, device=x.device, rotary=self.rotary)
        q, k, v = self.qkv_proj(x, length=span.positions.shape[1])
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if span.rotation is not None:
            q, k = (backend.call("rope", t, *span.rotation) for t in (q, k))
        attend = self._attend_in_context if span.context is not None else self._attend
        attend = partial(attend, span=span, cache=cache, mask=mask)
        if self.recompute and torch.is_grad_enabled():
            o = checkpoint(attend, q, k, v, use_reentrant=False)
        else:
            o = attend(q, k, v)
        if add_and_norm is not None:
            return self.out_proj.add_and_norm(o.flatten(-2), *add_and_norm)
        return self.out_proj(o.flatten(-2))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        span: Span,
        cache: KVCache | None,
        mask: Tensor | None,
    ) -> Tensor:
        if cache is not None:
            k, v = cache.write(k, v, span)
        if autocast.is_on():
            q, k, v = autocast.lowered(q, k, v)
        if self.dropout and span.seed is not None:
            layout, rank = self.qkv_proj.layout, self.qkv_proj.group.rank
            mask = mask if span.mask is None else span.mask if mask is None else span.mask & mask
            return attention_with_dropout(
                q,
                k,
                v,
                self.dropout,
                seed=span.seed_of(self.dropout_place),
                num_heads=layout.num_heads,
                first_head=layout.query[rank][0],
                causal=self.causal and span.mask is None,
                window=self.window if span.mask is None else None,
                mask=mask,
            )
        if span.mask is not None:
            mask = span.mask if mask is None else span.mask & mask
        # The span's own mask is complete; alone, "causal" and the window say what is seen.
        return backend.call(
            "attention",
            q,
            k,
            v,
            causal=self.causal and span.mask is None,
            window=self.window if span.mask is None else None,
            mask=mask,
        )

    def _attend_in_context(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        span: Span,
        cache: ContextKVCache | None,
        mask: Tensor | None,
    ) -> Tensor:
        if mask is not None:
            raise ValueError(
                "mask: expected None where the context is cut over ranks; use documents"
            )
        if self.dropout and span.seed is not None:
            raise ValueError(
                f"attention_dropout: expected 0 in training where the context is cut over ranks, got "
                f"{self.dropout}; set it to 0 in the config, or use tp and sequence_parallel"
            )
        return span.context.attend(q, k, v, cache=cache, causal=self.causal, window=self.window)
