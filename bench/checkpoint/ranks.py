"""What each rank of a large job holds of Llama 3.1 405B and AdamW's moments: pieces without storage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pyparallel.checkpoint.sharded import OPTIMIZER
from pyparallel.models.config import from_hugging_face
from pyparallel.models.weights import Source, sources
from pyparallel.saving.pieces import Piece, pieces_at

HIDDEN, INTERMEDIATE, VOCAB, HEADS, KV_HEADS, LAYERS = 16384, 53248, 128256, 128, 8, 126
CONFIG = from_hugging_face(
    {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
    }
)
# What AdamW keeps of a parameter, and the type of it and of the parameter.
KINDS = (("", torch.bfloat16), ("exp_avg", torch.float32), ("exp_avg_sq", torch.float32))
NUMBERS = {
    "step": {"dtype": "float32", "value": 1000.0},
    "exp_avg": "tensor",
    "exp_avg_sq": "tensor",
}


@dataclass(frozen=True)
class Job:
    """A mesh of dp x pp x tp ranks; with ``fsdp`` the ranks of dp cut what tp left once more."""

    dp: int
    pp: int
    tp: int
    fsdp: bool

    @property
    def ranks(self) -> int:
        return self.dp * self.pp * self.tp

    def stage(self, rank: int) -> int:
        """Of the pipeline; ranks are numbered by dp, pp, tp, the last the fastest."""
        return rank // self.tp % self.pp

    def __str__(self) -> str:
        return f"{'fsdp' if self.fsdp else 'dp'} {self.dp} x pp {self.pp} x tp {self.tp}"


def members(job: Job, stage: int) -> dict[str, tuple[Source, ...]]:
    """The parameters of a stage and what they are made of."""
    each = math.ceil(LAYERS / job.pp)
    layers = range(stage * each, min((stage + 1) * each, LAYERS))
    found = sources(CONFIG, job.tp)
    ends = {"embedding.weight": stage == 0}
    ends |= dict.fromkeys(("norm.weight", "head.weight"), stage == job.pp - 1)
    return {
        name: made_of
        for name, made_of in found.items()
        if (ends[name] if name in ends else int(name.split(".")[1]) in layers)
    }


def of_one_layer(found: dict[str, tuple[Source, ...]]) -> dict[str, tuple[Source, ...]]:
    """The parameters of the first layer, and what is in no layer."""
    layers = [int(name.split(".")[1]) for name in found if name.startswith("layers.")]
    first = f"layers.{min(layers)}."
    return {
        name: made_of
        for name, made_of in found.items()
        if name.startswith(first) or not name.startswith("layers.")
    }


def pieces(
    job: Job, rank: int, found: dict[str, tuple[Source, ...]], *, owned: bool
) -> Iterator[Piece]:
    """A rank's pieces of its parameters and of their moments."""
    tp, dp = rank % job.tp, rank // (job.tp * job.pp)
    for made_of in found.values():
        whole = _local_shape(made_of, tp)
        # FSDP2 cuts axis 0 as torch.chunk does.
        rows = math.ceil(whole[0] / job.dp) if job.fsdp else whole[0]
        begin = min(dp * rows, whole[0]) if job.fsdp else 0
        shape = min(rows, whole[0] - begin), *whole[1:]
        for key, dtype in KINDS:
            local = torch.empty(shape, dtype=dtype, device="meta")
            place = begin, *[0] * (len(whole) - 1)
            prefix = f"{OPTIMIZER}{key}/" if key else ""
            yield from pieces_at(local, place, whole, made_of, tp, owned=owned, prefix=prefix)


def optimizer_state(found: dict[str, tuple[Source, ...]]) -> dict[str, object]:
    """What a rank tells of an optimizer beside its tensors."""
    names = [source.name for source in itertools.chain.from_iterable(found.values())]
    options = {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    groups = [{"options": options, "names": names}]
    return {"groups": groups, "state": {name: dict(NUMBERS) for name in names}}


def _local_shape(made_of: tuple[Source, ...], tp: int) -> tuple[int, ...]:
    shapes = [source.sharding.local_shape(_dense_shape(source.name), tp) for source in made_of]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _dense_shape(name: str) -> tuple[int, ...]:
    if "norm" in name:
        return (HIDDEN,)
    kv = KV_HEADS * (HIDDEN // HEADS)
    rows = {"embed_tokens": VOCAB, "lm_head": VOCAB, "k_proj": kv, "v_proj": kv}
    rows |= {"gate_proj": INTERMEDIATE, "up_proj": INTERMEDIATE}
    columns = {"down_proj": INTERMEDIATE}
    kind = name.split(".")[-2]
    return rows.get(kind, HIDDEN), columns.get(kind, HIDDEN)
