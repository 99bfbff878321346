"""Activation bytes a rank and layer, measured beside the formulas of Korthikanti et al. 2022.

    python bench/training/activation_memory.py [--tokens 512 --batch 2 --hidden 1024 --heads 16]
        [--ranks 1 2 4]

Two layers are measured. *As in the paper*: attention written out with its own dropout, and dropouts that
keep their masks. *As this library does it*: torch's flash attention, masks from the seed.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from pyparallel.comm.group import Group
from pyparallel.launch import launch
from pyparallel.layers import (
    LayerNorm,
    ParallelAttention,
    ParallelMLP,
    SequenceParallelDropout,
    SequenceParallelLayerNorm,
)
from pyparallel.layers.span import Span
from pyparallel.mesh import init_mesh
from pyparallel.training.activation_memory import (
    LayerSizes,
    kept_for_backward,
    layer_bytes,
    paper_bytes,
)

DROPOUT = 0.1


class MaskDropout(nn.Module):
    """Dropout that keeps a mask of one byte an element, as the paper counts it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, DROPOUT, True)[0]


class WrittenOutAttention(ParallelAttention):
    """Attention that keeps its scores, with dropout on them, as the paper counts it."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(2, 3)
        # In place: neither the scale nor the mask keeps anything.
        scores.mul_(q.shape[-1] ** -0.5)
        scores += torch.full(scores.shape[2:], -torch.inf, dtype=q.dtype).triu_(1)
        weights = torch.native_dropout(scores.softmax(-1), DROPOUT, True)[0]
        return (weights @ v).transpose(1, 2)


class Layer(nn.Module):
    """GPT's layer, as the paper counts it or as this library does it."""

    def __init__(
        self,
        sizes: LayerSizes,
        group: Group,
        *,
        sequence_parallel: bool,
        recompute: str,
        paper: bool,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"group": group, "sequence_parallel": sequence_parallel}
        hidden = sizes.hidden
        self.recompute = recompute
        if sequence_parallel:
            self.norms = nn.ModuleList(
                SequenceParallelLayerNorm(hidden, group=group) for _ in range(2)
            )
        else:
            self.norms = nn.ModuleList(LayerNorm(hidden) for _ in range(2))
        kind = WrittenOutAttention if paper else ParallelAttention
        self.attention = kind(
            hidden, sizes.heads, causal=True, recompute=recompute == "attention", **options
        )
        self.mlp = ParallelMLP(hidden, 4 * hidden, "gelu", True, **options)
        if paper:
            self.dropouts = nn.ModuleList(MaskDropout() for _ in range(2))
        else:
            over = group if sequence_parallel else Group.single()
            self.dropouts = nn.ModuleList(
                SequenceParallelDropout(DROPOUT, group=over) for _ in range(2)
            )

    def block(self, x: Tensor, span: Span) -> Tensor:
        x = x + self.dropouts[0](self.attention(self.norms[0](x), span=span))
        length = span.positions.shape[1]
        return x + self.dropouts[1](self.mlp(self.norms[1](x), length=length))

    def forward(self, x: Tensor, span: Span) -> Tensor:
        if self.recompute == "layers":
            return torch.utils.checkpoint.checkpoint(self.block, x, span, use_reentrant=False)
        return self.block(x, span)


def measure(
    sizes: LayerSizes, *, sequence_parallel: bool, recompute: str, paper: bool, group: Group
) -> int:
    """Bytes that this rank keeps of one layer in bf16; its backward runs too."""
    torch.manual_seed(0)
    layer = Layer(
        sizes, group, sequence_parallel=sequence_parallel, recompute=recompute, paper=paper
    ).to(torch.bfloat16)
    tokens = sizes.tokens
    if sequence_parallel:
        tokens //= group.size
    x = torch.randn(sizes.batch, tokens, sizes.hidden, dtype=torch.bfloat16, requires_grad=True)
    span = Span.of([0] * sizes.batch, sizes.tokens)
    y, kept = kept_for_backward(lambda: layer(x, span), list(layer.parameters()))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    return kept


MODES = [
    (sequence_parallel, recompute)
    for recompute in ("none", "attention", "layers")
    for sequence_parallel in (False, True)
]


def rank_rows(tokens: int, batch: int, hidden: int, heads: int) -> list[dict[str, Any]]:
    """The table's rows for this many ranks; called by every rank."""
    group = init_mesh(tp=torch.distributed.get_world_size()).tp
    sizes = LayerSizes(tokens, batch, hidden, heads, group.size)
    rows = []
    for sequence_parallel, recompute in MODES:
        mode = {"sequence_parallel": sequence_parallel, "recompute": recompute}
        rows.append(
            {
                "ranks": group.size,
                **mode,
                "paper_formula": paper_bytes(sizes, **mode),
                "paper_measured": measure(sizes, **mode, paper=True, group=group),
                "formula": layer_bytes(sizes, **mode),
                "measured": measure(sizes, **mode, paper=False, group=group),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in MiB, with the deviation of what is measured from each formula."""
    lines = [
        "| tp | sequence parallel | recomputed | paper's formula | measured, as in the paper | "
        "| this library's formula | measured | |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [str(row["ranks"]), "yes" if row["sequence_parallel"] else "no", row["recompute"]]
        for formula, measured in (("paper_formula", "paper_measured"), ("formula", "measured")):
            off = row[measured] / row[formula] - 1
            cells += [f"{row[formula] / 2**20:.2f}", f"{row[measured] / 2**20:.2f}", f"{off:+.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    for ranks in given.ranks:
        results = launch(rank_rows, ranks, given.tokens, given.batch, given.hidden, given.heads)
        rows += results[0]
    if given.json:
        sizes = LayerSizes(given.tokens, given.batch, given.hidden, given.heads)
        print(json.dumps({"sizes": asdict(sizes), "torch": torch.__version__, "rows": rows}))
        return
    print(
        f"s={given.tokens} b={given.batch} h={given.hidden} a={given.heads}, bf16; MiB a rank and "
        f"layer; torch {torch.__version__}, {platform.machine()}\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
