"""What a transformer layer keeps for backward: the formulas, and what a run really keeps.

Legend: s tokens, b sequences, h hidden, a heads, t tensor-parallel ranks. Activations take 2 bytes,
masks of dropout 1. A layer is GPT's: norm, attention, dropout, norm, MLP of 4 h with GELU, dropout,
and residuals. Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models",
equations 1 to 6 and table 2, count in bytes a rank and layer:

    tensor parallel                         s b h (10 + 24 / t + 5 a s / (h t))
    + sequence parallel                     s b h (34 / t + 5 a s / (h t))
    + attention recomputed (selective)      s b h 34 / t
    tensor parallel, attention recomputed   s b h (10 + 24 / t)
    layers recomputed                       2 s b h    (with sequence parallel 2 s b h / t)

This library keeps less: a dropout's mask is computed again from its seed, and attention keeps its output
(which the output projection keeps anyway) and one fp32 number a query, not the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RECOMPUTE = ("none", "attention", "layers")


@dataclass(frozen=True)
class LayerSizes:
    """s, b, h, a and t of a layer."""

    tokens: int
    batch: int
    hidden: int
    heads: int
    ranks: int = 1

    @property
    def unit(self) -> int:
        """s b h."""
        return self.tokens * self.batch * self.hidden


def layer_bytes(
    sizes: LayerSizes,
    *,
    sequence_parallel: bool,
    recompute: str = "none",
    keeps_scores: bool = False,
    keeps_masks: bool = False,
) -> float:
    """Bytes that a layer keeps for backward on one rank.

    Args:
        recompute: "none"; "attention", all between q, k, v and the output projection; "layers".
        keeps_scores: attention keeps its probabilities before and after dropout, and that mask, as in
            the paper. False: it keeps a log-sum-exp.
        keeps_masks: the two dropouts on the residual keep their masks, as in the paper.

    Raises:
        ValueError: another recompute.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute: expected one of {RECOMPUTE}, got {recompute!r}")
    # What lies between the matmuls is cut over the ranks with sequence parallelism alone.
    between = sizes.unit / (sizes.ranks if sequence_parallel else 1)
    inside = sizes.unit / sizes.ranks
    if recompute == "layers":
        return 2 * between
    # Inputs of two norms and of two column layers, and the masks.
    total = (8 + 2 * keeps_masks) * between
    # q, k, v; the output projection's input; the MLP's before and after GELU.
    total += (6 + 2 + 8 + 8) * inside
    if recompute == "none":
        scores = sizes.heads * sizes.tokens**2 * sizes.batch / sizes.ranks
        queries = sizes.heads * sizes.tokens * sizes.batch / sizes.ranks
        total += 5 * scores if keeps_scores else 4 * queries
    return total


def paper_bytes(sizes: LayerSizes, *, sequence_parallel: bool, recompute: str = "none") -> float:
    """The paper's formula, with its masks and scores."""
    return layer_bytes(
        sizes,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
        keeps_scores=True,
        keeps_masks=True,
    )


def kept_for_backward(run: Callable[[], Tensor], parameters: list[Tensor]) -> tuple[Tensor, int]:
    """``run()``'s result and the bytes of all memory that autograd holds on to for its backward.

    Memory that several saved tensors share counts once, the parameters' not at all.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Held until the end, so that no address is used twice.
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(storage.nbytes() for storage in kept.values())
