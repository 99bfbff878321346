"""Shipped configurations of the attention kernels; see configurations.py."""

from __future__ import annotations

from dataclasses import dataclass

from pyparallel.kernels.configurations import family


@dataclass(frozen=True)
class AttentionConfig:
    """block_m queries by block_n keys a step. Backward: the two tiles of the dk/dv pass."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    note: str = ""

    @property
    def label(self) -> str:
        return f"{self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages}"


_FMA = "fp32 in full precision has no tensor core instruction: FMA units"
_WIDE_HEADS = ("wgmma needs 64 keys, whose dk and dv of 256 columns leave too few registers: "
               "32 keys on mma.sync do not spill")

# (pass, operand, head size up to) -> configuration. Passes: forward; backward_kv (one tile of
# keys, all queries); backward_q (one tile of queries, all keys); decode (keys of one split).
_ROWS: dict[str, dict[tuple[str, str, int], AttentionConfig]] = {
    "interpreter": {
        (which, operand, size): AttentionConfig(16, 16, 1, 1)
        for which in ("forward", "backward_kv", "backward_q", "decode")
        for operand in ("half", "ieee", "tf32")
        for size in (64, 128, 256)
    },
    "sm_80": {
        ("forward", "half", 64): AttentionConfig(128, 64, 8, 3),
        ("forward", "half", 128): AttentionConfig(128, 32, 8, 3),
        ("forward", "half", 256): AttentionConfig(64, 32, 8, 2),
        ("forward", "ieee", 64): AttentionConfig(32, 16, 4, 2, _FMA),
        ("forward", "ieee", 128): AttentionConfig(32, 16, 4, 2, _FMA),
        ("forward", "ieee", 256): AttentionConfig(16, 16, 8, 1, _FMA),
        ("backward_kv", "half", 64): AttentionConfig(32, 64, 4, 2),
        ("backward_kv", "half", 128): AttentionConfig(32, 64, 8, 2),
        ("backward_kv", "half", 256): AttentionConfig(16, 32, 8, 1),
        ("backward_kv", "ieee", 64): AttentionConfig(16, 32, 8, 1, _FMA),
        ("backward_kv", "ieee", 128): AttentionConfig(16, 16, 8, 1, _FMA),
        ("backward_kv", "ieee", 256): AttentionConfig(16, 16, 8, 1, _FMA),
        ("backward_q", "half", 64): AttentionConfig(64, 32, 4, 2),
        ("backward_q", "half", 128): AttentionConfig(64, 32, 8, 2),
        ("backward_q", "half", 256): AttentionConfig(32, 16, 8, 1),
        ("backward_q", "ieee", 64): AttentionConfig(32, 16, 8, 1, _FMA),
        ("backward_q", "ieee", 128): AttentionConfig(16, 16, 4, 1, _FMA),
        ("backward_q", "ieee", 256): AttentionConfig(16, 16, 8, 1, _FMA),
        ("decode", "half", 64): AttentionConfig(16, 64, 4, 3),
        ("decode", "half", 128): AttentionConfig(16, 64, 4, 3),
        ("decode", "half", 256): AttentionConfig(16, 32, 4, 2),
        ("decode", "ieee", 64): AttentionConfig(16, 32, 8, 2, _FMA),
        ("decode", "ieee", 128): AttentionConfig(16, 32, 8, 2, _FMA),
        ("decode", "ieee", 256): AttentionConfig(16, 16, 8, 2, _FMA),
    },
}
_ROWS["sm_90"] = _ROWS["sm_80"] | {
    ("forward", "half", 64): AttentionConfig(128, 64, 8, 3),
    ("forward", "half", 128): AttentionConfig(128, 64, 8, 3),
    ("forward", "half", 256): AttentionConfig(128, 32, 8, 2),
    ("forward", "ieee", 64): AttentionConfig(32, 32, 4, 2, _FMA),
    ("forward", "ieee", 128): AttentionConfig(32, 16, 8, 2, _FMA),
    ("backward_kv", "half", 64): AttentionConfig(64, 64, 4, 3),
    ("backward_kv", "half", 128): AttentionConfig(32, 128, 8, 3),
    ("backward_kv", "half", 256): AttentionConfig(16, 32, 8, 1, _WIDE_HEADS),
    ("backward_q", "half", 64): AttentionConfig(64, 64, 4, 3),
    ("backward_q", "half", 128): AttentionConfig(128, 64, 8, 3),
    ("backward_q", "half", 256): AttentionConfig(64, 32, 8, 2),
}
_ROWS["sm_100"] = _ROWS["sm_90"] | {
    ("forward", "half", 64): AttentionConfig(128, 64, 8, 4),
    ("forward", "half", 128): AttentionConfig(128, 64, 8, 2),
    # 128 rows fill tcgen05, sm_90's 64 half of it.
    ("backward_kv", "half", 64): AttentionConfig(64, 128, 8, 2),
    ("backward_q", "half", 64): AttentionConfig(128, 64, 8, 2),
    # 128 keys don't fit tensor memory.
    ("backward_kv", "half", 256): AttentionConfig(32, 64, 8, 1),
    ("backward_q", "half", 256): AttentionConfig(64, 64, 8, 1),
    ("backward_kv", "ieee", 128): AttentionConfig(16, 16, 4, 1, _FMA),
}
_ROWS["gfx942"] = {
    key: AttentionConfig(row.block_m, row.block_n, min(row.num_warps, 4), 1)
    for key, row in _ROWS["sm_80"].items()
}
# 99 KiB of shared memory.
_ROWS["sm_86"] = {
    key: AttentionConfig(row.block_m, row.block_n, row.num_warps, min(row.num_stages, 2), row.note)
    for key, row in _ROWS["sm_80"].items()
}


def attention_config(
    arch: str, which: str, head_dim: int, itemsize: int, precision: str = "ieee"
) -> AttentionConfig:
    """The configuration of a pass for heads of head_dim elements of itemsize bytes."""
    rows = _ROWS[family(arch)]
    size = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    operand = "half" if itemsize == 2 else "ieee"
    # tf32 is opt-in and shares the tiles of full precision.
    return rows[which, operand, size]


def attention_rows(arch: str, which: str) -> list[tuple[str, int, AttentionConfig]]:
    """Every shipped (operand, head size, configuration) of a pass on an architecture."""
    return [(operand, size, row) for (name, operand, size), row in _ROWS[family(arch)].items()
            if name == which]
