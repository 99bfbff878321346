"""An embedding whose rows (vocabulary) are cut over the ranks.

    forward   y[..., H] = all_reduce(weight_shard_v[ids - start] where owned, else 0)
    wgrad     dweight_shard_v[id - start] += dy, for the owned ids

With the sequence cut, each rank gets its own tokens' rows:

    forward   y_shard_s[..., S_r, H] = reduce_scatter(weight_shard_v[ids - start] ...)
    wgrad     as above, of all_gather(dy_shard_s)

One rank adds the row and the others add zeros, so the result is exact.
Communication: one all-reduce forward, none backward; with the sequence cut one reduce-scatter forward,
one all-gather backward.
Sources: Shoeybi et al. 2019, "Megatron-LM", section 3; Korthikanti et al. 2022, section 4.2.2.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pyparallel.comm.collectives import all_reduce, reduce_scatter
from pyparallel.comm.group import Group
from pyparallel.comm.sequence import sequence_sizes


def vocab_parallel_embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    start: int,
    group: Group,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    sequence_parallel: bool = False,
) -> Tensor:
    """Look ``ids`` up in a table of which this rank holds the rows from ``start`` on.

    Args:
        ids: [..., S], int64, within the whole vocabulary. weight: [V_r, H].
        padding_idx: an id, counted in the whole vocabulary, whose row gets no gradient.
        sequence_parallel: return this rank's tokens only.
    """
    stop = start + weight.shape[0]
    options = {"scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
    if group.size == 1:
        return F.embedding(ids, weight, padding_idx, **options)
    foreign = (ids < start) | (ids >= stop)
    if weight.shape[0] == 0:
        rows = weight.new_zeros(*ids.shape, weight.shape[1]) + weight.sum()
    else:
        local_padding = None
        if padding_idx is not None and start <= padding_idx < stop:
            local_padding = padding_idx - start
        if scale_grad_by_freq:
            # Foreign ids must not count as uses of a row: only the owned ones are looked up.
            found = F.embedding(ids[~foreign] - start, weight, local_padding, **options)
            rows = found.new_zeros(*ids.shape, weight.shape[1])
            rows = rows.masked_scatter(~foreign.unsqueeze(-1), found)
        else:
            local = (ids - start).masked_fill(foreign, 0)
            rows = F.embedding(local, weight, local_padding, **options)
            rows = rows.masked_fill(foreign.unsqueeze(-1), 0)
    if sequence_parallel:
        sizes = sequence_sizes(ids.shape[-1], group)
        return reduce_scatter(rows, group, dim=-2, sizes=sizes)
    return all_reduce(rows, group)
