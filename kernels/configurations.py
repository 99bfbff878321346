"""Shipped configurations: frozen data by architecture and shape class.

A note beside a configuration says what it gives up and why. Shared memory a block may use:
sm_80 163 KiB, sm_86/89/120 99 KiB, sm_90 and sm_100 227 KiB, gfx942 64 KiB; registers a
thread: 255. The report (`pyparallel kernels`) compiles every row and prints what it takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_BYTES = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448,
                "gfx942": 65536}
# Multiprocessors (compute units) that choices count with, whatever part of them a device has.
PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "gfx942": 304}

# Up to here matmul has tiles of its own for few rows.
FEW_ROWS = 128


def family(arch: str) -> str:
    """The architecture whose rows serve `arch`: the nearest one at or below it."""
    if arch == "interpreter" or arch in ARCHITECTURES:
        return arch
    if arch in ("sm_86", "sm_87", "sm_89", "sm_120", "sm_121"):
        return "sm_86"
    if arch.startswith("sm_10"):
        return "sm_100"
    if arch.startswith("gfx9"):
        return "gfx942"
    raise ValueError(
        f"arch: expected one of {', '.join(ARCHITECTURES)} or a relative, got {arch}; "
        "use another backend there"
    )


@dataclass(frozen=True)
class MatmulConfig:
    """swap: multiply w @ x^T, for x of few rows. group_m: rows of tiles walked together."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    swap: bool = False
    note: str = ""

    @property
    def label(self) -> str:
        return (f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} "
                f"s{self.num_stages}" + (" swap" if self.swap else ""))

    def tiles(self, m: int, n: int) -> int:
        """Tiles of an output [m, n]."""
        return -(-m // self.block_m) * -(-n // self.block_n)


# Shape classes by rows of x: decode up to 16, thin up to 64, wide above.
# Operand classes: half (fp16, bf16), fp8, ieee (fp32 in full precision), tf32.
_FEW_ON_MMA = "16 rows by mma.sync: memory is the limit, and wgmma would pad them to 64"
_NO_TENSOR_CORE = "fp32 in full precision has no tensor core instruction: FMA units"
_MATMUL: dict[str, dict[tuple[str, str], MatmulConfig]] = {
    "interpreter": {
        (operand, shape): MatmulConfig(32, 32, 32, 1, 1, 2, shape == "decode")
        for operand in ("half", "fp8", "ieee", "tf32")
        for shape in ("decode", "thin", "wide")
    },
    "sm_80": {
        ("half", "decode"): MatmulConfig(16, 128, 64, 4, 5),
        ("half", "thin"): MatmulConfig(64, 128, 64, 4, 4),
        ("half", "wide"): MatmulConfig(128, 256, 64, 8, 3),
        ("ieee", "decode"): MatmulConfig(16, 64, 32, 4, 4, note=_NO_TENSOR_CORE),
        ("ieee", "thin"): MatmulConfig(64, 64, 32, 4, 3, note=_NO_TENSOR_CORE),
        ("ieee", "wide"): MatmulConfig(64, 64, 32, 4, 3, note=_NO_TENSOR_CORE),
        ("tf32", "decode"): MatmulConfig(16, 64, 64, 4, 4),
        ("tf32", "thin"): MatmulConfig(64, 128, 32, 4, 4),
        ("tf32", "wide"): MatmulConfig(128, 128, 32, 8, 4),
        # ("fp8", *) absent: sm_80 has no e4m3 conversion instruction.
    },
    "sm_90": {
        ("half", "decode"): MatmulConfig(16, 64, 128, 4, 6, swap=True),
        ("half", "thin"): MatmulConfig(64, 128, 64, 4, 5),
        ("half", "wide"): MatmulConfig(128, 128, 64, 8, 4),
        ("fp8", "decode"): MatmulConfig(16, 128, 128, 4, 5, swap=True),
        ("fp8", "thin"): MatmulConfig(64, 128, 128, 4, 4),
        ("fp8", "wide"): MatmulConfig(128, 128, 128, 8, 4),
        ("ieee", "decode"): MatmulConfig(16, 64, 32, 4, 4, note=_NO_TENSOR_CORE),
        ("ieee", "thin"): MatmulConfig(64, 64, 32, 8, 3, note=_NO_TENSOR_CORE),
        ("ieee", "wide"): MatmulConfig(64, 64, 32, 8, 3, note=_NO_TENSOR_CORE),
        ("tf32", "decode"): MatmulConfig(16, 128, 64, 4, 4, swap=True),
        ("tf32", "thin"): MatmulConfig(64, 128, 32, 4, 4),
        ("tf32", "wide"): MatmulConfig(128, 128, 32, 8, 4),
    },
    "gfx942": {
        ("half", "decode"): MatmulConfig(16, 64, 128, 4, 2),
        ("half", "thin"): MatmulConfig(64, 64, 128, 4, 2),
        ("half", "wide"): MatmulConfig(128, 128, 64, 4, 2),
        ("fp8", "decode"): MatmulConfig(16, 64, 256, 4, 2),
        ("fp8", "thin"): MatmulConfig(64, 64, 128, 4, 2),
        ("fp8", "wide"): MatmulConfig(128, 128, 128, 4, 2),
        ("ieee", "decode"): MatmulConfig(16, 64, 64, 4, 2),
        ("ieee", "thin"): MatmulConfig(64, 64, 64, 4, 2),
        ("ieee", "wide"): MatmulConfig(128, 64, 32, 4, 2),
        ("tf32", "decode"): MatmulConfig(16, 64, 64, 4, 2),
        ("tf32", "thin"): MatmulConfig(64, 64, 64, 4, 2),
        ("tf32", "wide"): MatmulConfig(128, 64, 32, 4, 2),
    },
}
# Beside the row above, for up to FEW_ROWS rows and columns so few that its tiles would leave
# multiprocessors idle. Measured on an H100; splits of K were slower wherever these fit.
_FEW_ROWS: dict[tuple[str, str, str], tuple[MatmulConfig, ...]] = {
    ("sm_90", "half", "thin"): (MatmulConfig(32, 64, 128, 4, 5, swap=True),),
    ("sm_90", "half", "wide"): (MatmulConfig(128, 32, 128, 4, 5), MatmulConfig(128, 128, 128, 8, 3)),
}
_FEW_ROWS |= {("sm_100", *key[1:]): rows for key, rows in _FEW_ROWS.items()}
_MATMUL["sm_100"] = dict(_MATMUL["sm_90"])
# 99 KiB of shared memory: the same tiles as sm_80 with fewer stages in flight.
_MATMUL["sm_86"] = {
    key: replace(row, num_stages=2 if row.block_n == 256 else min(row.num_stages, 3))
    for key, row in _MATMUL["sm_80"].items()
}


# A row or column that a tile reads at each step of K costs as much as so many of its sums.
READ_COST = 32


def least_rounds(rows: tuple[MatmulConfig, ...], arch: str, m: int, n: int) -> MatmulConfig:
    """The row whose rounds of tiles over an output [m, n] take least."""
    processors = PROCESSORS.get(family(arch), 1)

    def cost(row: MatmulConfig) -> int:
        rounds = -(-row.tiles(m, n) // processors)
        return rounds * (row.block_m * row.block_n + READ_COST * (row.block_m + row.block_n))

    return min(rows, key=cost)


def _classes(m: int, itemsize: int, precision: str) -> tuple[str, str]:
    """(operand, shape) class."""
    operand = {1: "fp8", 2: "half"}.get(itemsize) or ("ieee" if precision == "ieee" else "tf32")
    return operand, "decode" if m <= 16 else "thin" if m <= 64 else "wide"


def _shipped_row(arch: str, m: int, itemsize: int, precision: str) -> MatmulConfig:
    operand, shape = _classes(m, itemsize, precision)
    row = _MATMUL[family(arch)].get((operand, shape))
    if row is None:
        raise ValueError(f"matmul: {operand} operands have no configuration on {arch}; "
                         "cast them to bf16")
    return row


def matmul_config(
    arch: str, m: int, n: int, k: int, itemsize: int, precision: str = "ieee"
) -> MatmulConfig:
    """The configuration for x [m, k] @ w [n, k]^T with operands of itemsize bytes."""
    row = _shipped_row(arch, m, itemsize, precision)
    few = _FEW_ROWS.get((family(arch), *_classes(m, itemsize, precision)), ())
    return least_rounds((*few, row), arch, m, n) if few and m <= FEW_ROWS else row


def fused_matmul_config(
    arch: str, m: int, n: int, k: int, itemsize: int, precision: str = "ieee"
) -> MatmulConfig:
    """matmul's row for a kernel that also communicates."""
    return beside_flags(_shipped_row(arch, m, itemsize, precision))


def beside_flags(row: MatmulConfig) -> MatmulConfig:
    """Beside the flags' and peers' addresses accumulators of 128 x 256 on 8 warps do not fit the
    registers, and of 64 x 128 on 4 barely (Triton 3.6 spills)."""
    block_n = min(row.block_n, 128)
    warps = 8 if (row.block_m, block_n) == (64, 128) else row.num_warps
    return replace(row, block_n=block_n, num_warps=warps)


def matmul_rows(arch: str, *, few: bool = True) -> list[tuple[str, str, MatmulConfig]]:
    """Every shipped (operand, shape class, configuration) of an architecture; few: also those that
    only matmul has, for few rows."""
    rows = [(operand, shape, row) for (operand, shape), row in _MATMUL[family(arch)].items()]
    return rows + [(operand, shape, row) for (name, operand, shape), found in _FEW_ROWS.items()
                   if few and name == family(arch) for row in found]


# (kernel, architecture, bytes of an operand's element) of the kernels with descriptors. sm_80 and
# gfx942 have no copy engine that takes tensor maps: descriptors become pointers there.
_DESCRIPTOR: dict[tuple[str, str, int], tuple[MatmulConfig, ...]] = {
    ("matmul", "sm_90", 2): (MatmulConfig(128, 256, 64, 8, 3), MatmulConfig(128, 128, 64, 8, 6),
                             MatmulConfig(64, 128, 64, 4, 6)),
    ("matmul", "sm_90", 1): (MatmulConfig(128, 256, 128, 8, 3),),
    # Two accumulators: 128 x 128 each fill the registers as one of 128 x 256 does.
    ("gated_mlp", "sm_90", 2): (MatmulConfig(128, 128, 64, 8, 3),),
    **{(kernel, "interpreter", itemsize): (MatmulConfig(32, 32, 32, 1, 1, 2),)
       for kernel in ("matmul", "gated_mlp") for itemsize in (1, 2, 4)},
}
# On sm_100 the gated one spills 24 bytes where it also stores gate and up; half the columns don't.
_DESCRIPTOR |= {(kernel, "sm_100", itemsize): rows
                for (kernel, arch, itemsize), rows in _DESCRIPTOR.items() if arch == "sm_90"}
# Rows from which descriptors are faster than pointers: measured on an H100.
DESCRIPTOR_ROWS = {"matmul": FEW_ROWS + 1, "gated_mlp": 1024}


def descriptor_config(kernel: str, arch: str, m: int, n: int, itemsize: int) -> MatmulConfig:
    """The row for an output [m, n] whose rounds of tiles take least; ValueError where the
    architecture has none. kernel: "matmul" or "gated_mlp"."""
    rows = _DESCRIPTOR.get((kernel, family(arch), itemsize))
    if rows is None:
        raise ValueError(f"{kernel}_descriptor: no configuration for {itemsize}-byte operands on "
                         f"{arch}; call {kernel}")
    return least_rounds(rows, arch, m, n)


def descriptors_pay(kernel: str, arch: str, m: int, n: int, itemsize: int) -> bool:
    """Whether many rows give at least half of the multiprocessors a tile moved by descriptors."""
    if m < DESCRIPTOR_ROWS[kernel] or (kernel, family(arch), itemsize) not in _DESCRIPTOR:
        return False
    row = descriptor_config(kernel, arch, m, n, itemsize)
    # The interpreter has no copy engine: what it runs is chosen by name.
    return 2 * row.tiles(m, n) >= PROCESSORS.get(family(arch), 1 << 62)


def descriptor_rows(kernel: str, arch: str) -> list[tuple[int, MatmulConfig]]:
    """Every shipped (bytes of an element, configuration) of the kernel with descriptors."""
    return [(size, row) for (name, where, size), rows in _DESCRIPTOR.items()
            if (name, where) == (kernel, family(arch)) for row in rows]


def gated_mlp_config(
    arch: str, m: int, itemsize: int, precision: str = "ieee"
) -> MatmulConfig:
    """matmul's row with half the columns, because a tile has two accumulators."""
    if itemsize == 2 and m <= 16 and family(arch) == "sm_90":
        return MatmulConfig(16, 32, 256, 4, 3, note=_FEW_ON_MMA)
    row = _shipped_row(arch, m, itemsize, precision)
    # Two accumulators can't be swapped to fill the 64-row instructions: x is padded to them.
    padded = itemsize < 4 and family(arch) in ("sm_90", "sm_100")
    thin = max(64, row.block_m) if padded else row.block_m
    stages = max(2, row.num_stages - 1) if row.num_stages > 1 else 1
    return replace(row, block_m=thin, block_n=min(max(row.block_n // 2, 16), 64), swap=False,
                   num_stages=stages, num_warps=row.num_warps if itemsize < 4 else 8,
                   block_k=min(row.block_k, 64) if itemsize > 1 else row.block_k)


# Row kernels hold a whole row in registers: 16 elements a thread, two 128-bit loads of bf16.
# Above WIDE_ROW a thread holds 32, and the bias gradient and dropout, which need registers of
# their own, run as kernels of their own (dropout of the backward pass from WIDE_ROW on).
MAX_ROW = 16384
WIDE_ROW = 8192
ROWS_PER_PROGRAM = 16


def row_warps(block: int) -> int:
    """Warps for a program that holds `block` elements of a row."""
    if block > MAX_ROW:
        raise ValueError(f"last dimension: expected at most {MAX_ROW}, got up to {block}; "
                         "a row must fit one program's registers: use another backend")
    return min(16, max(1, block // 512))


@dataclass(frozen=True)
class ElementwiseConfig:
    """block: elements that a program takes at a time, 8 a thread: 16 bytes of bf16."""

    block: int
    num_warps: int


_ELEMENTWISE: dict[str, dict[str, ElementwiseConfig]] = {
    # Streams: rope, dropout, activations. Collectives: longer blocks between two flags.
    "stream": {
        "interpreter": ElementwiseConfig(1024, 1),
        "sm_80": ElementwiseConfig(1024, 4),
        # Waves have 64 lanes: as many warps would leave 8 bytes a thread.
        "gfx942": ElementwiseConfig(1024, 2),
    },
    "collective": {
        "interpreter": ElementwiseConfig(2048, 1),
        "sm_80": ElementwiseConfig(2048, 8),
        "gfx942": ElementwiseConfig(2048, 4),
    },
}
for _rows in _ELEMENTWISE.values():
    _rows |= dict.fromkeys(("sm_86", "sm_90", "sm_100"), _rows["sm_80"])


def elementwise_config(arch: str, shape: str) -> ElementwiseConfig:
    """The configuration of a kernel that works element by element; shape: "stream" or
    "collective"."""
    return _ELEMENTWISE[shape][family(arch)]
