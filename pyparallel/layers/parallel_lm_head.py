"""The projection to the vocabulary, with the vocabulary cut over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.comm.group_of import GroupLike, group_of
from pyparallel.layers.column_parallel_linear import ColumnParallelLinear
from pyparallel.layers.owner import is_touched
from pyparallel.layers.vocab_parallel_embedding import vocab_sharding
from pyparallel.ops.column_parallel_linear import column_parallel_linear
from pyparallel.ops.next_token import Said, Sampling, sample
from pyparallel.ops.packed_linear import packed_linear


class ParallelLMHead(ColumnParallelLinear):
    """``logits = x W^T + b`` with W's rows cut as :class:`VocabParallelEmbedding` cuts its own.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``; dense sizes.
        group: the ranks; torch's own objects are taken too.
        gather_output: :meth:`forward` returns all logits [..., V] on every rank (the default), or
            this rank's [..., V_r], as the vocab-parallel cross-entropy takes them.
        sequence_parallel: :meth:`forward` takes this rank's tokens, and gathers them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: GroupLike,
        gather_output: bool = True,
        sequence_parallel: bool = False,
    ) -> None:
        group = group_of(group)
        super().__init__(
            in_features,
            out_features,
            bias,
            device,
            dtype,
            group=group,
            gather_output=gather_output,
            sharding=vocab_sharding(out_features, group.shares),
            sequence_parallel=sequence_parallel,
        )

    def local_logits(self, x: Tensor) -> Tensor:
        """This rank's logits [..., V_r] of a replicated ``x [..., K]``."""
        if (packed := self.packed) is not None:
            return packed_linear(x, packed, self.bias)
        return column_parallel_linear(x, self.weight, self.bias, group=self.group)

    def greedy(self, x: Tensor) -> Tensor:
        """The likeliest id [B] after each hidden state of ``x [B, K]``; no logits are gathered."""
        return self.sample(x, Sampling(), torch.zeros(x.shape[0], dtype=torch.long))

    def sample(
        self, x: Tensor, sampling: Sampling, draws: Tensor, said: Said | None = None
    ) -> Tensor:
        """A drawn id [B] after each hidden state of ``x [B, K]``; no logits are gathered.

        Args:
            draws: [B], int64: a number of its own for each draw of ``sampling.seed``.
            said: the tokens so far, for ``sampling.rules``.
        """
        logits, start, group = self.logits_to_sample(x)
        return sample(logits, sampling, draws, start=start, group=group, said=said)

    def logits_to_sample(self, x: Tensor) -> tuple[Tensor, int, Group]:
        """The logits that tokens are chosen from, the first one's id, and the ranks they are cut over.

        They are this rank's; where a hook sees the output, or another forward makes it, they are whole.
        """
        if not is_touched(self) and type(self).forward is ColumnParallelLinear.forward:
            return self.local_logits(x), self._start, self.group
        logits = self(x)
        if logits.shape[-1] == self.out_features:
            return logits, 0, Group.single()
        return logits, self._start, self.group

    @property
    def _start(self) -> int:
        return self.shardings["weight"].ranges[self.group.rank][0][0]
