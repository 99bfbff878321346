"""Compile one kernel for one architecture without a GPU, and read what came out.

Triton compiles from an abstract signature to a cubin (or a code object for AMD); the figures
come from the cubin's resource usage, from the ptx or amdgcn text and from Triton's metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from pyparallel.kernels.report.architectures import CUDA_TOOLS, target_of


@dataclass(frozen=True)
class Case:
    """One kernel in one shipped configuration.

    pointers: argument -> element type. constants: constexpr values, None pointers, strides
    of 1. Other arguments are i32 (floats: fp32, longs: i64), multiples of 16 unless listed
    in `odd`, the way the launcher finds them for aligned tensors. tensor_core: the kernel
    must use the architecture's best matrix instruction. waiver: why a line is not met.
    """

    name: str
    variant: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 2
    floats: tuple[str, ...] = ()
    longs: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    tensor_core: bool = False
    wide_loads: bool = True
    waiver: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def signature(self) -> dict[str, str]:
        signature = {}
        for name in self.kernel.arg_names:
            if name in self.constants:
                signature[name] = "constexpr"
            elif name in self.pointers:
                kind = self.pointers[name]
                signature[name] = kind if kind.startswith("tensordesc") else "*" + kind
            elif name in self.floats:
                signature[name] = "fp32"
            else:
                signature[name] = "i64" if name in self.longs else "i32"
        return signature

    def attributes(self) -> dict[tuple[int, ...], list[list[Any]]]:
        found: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, (name, kind) in enumerate(self.signature().items()):
            if kind[0] in "*i" and name not in self.odd:
                found[(index,)] = [["tt.divisibility", 16]]
        return found


_MMA = {
    "tcgen05": r"\btcgen05\.mma\b", "wgmma": r"\bwgmma\.mma_async\b", "mma.sync": r"\bmma\.sync\b",
    "mfma": r"\bv_mfma_\w+", "wmma": r"\bv_s?wmma\w+",
}
# registers a multiprocessor, threads a multiprocessor, shared bytes a multiprocessor.
_LIMITS = {
    "sm_80": (65536, 2048, 167936), "sm_86": (65536, 1536, 102400),
    "sm_90": (65536, 2048, 233472), "sm_100": (65536, 2048, 233472),
}


def _width_ptx(text: str, verb: str) -> int:
    """Widest contiguous global access of a thread, in bytes (bulk tensor copies count 128)."""
    widest = 0
    for match in re.finditer(rf"\b{verb}\.[\w.:]*?global[\w.:]*", text):
        vector = re.search(r"\.v(\d)", match.group(0))
        bits = re.search(r"\.[bfus](\d+)\b", match.group(0))
        if bits:
            widest = max(widest, int(bits.group(1)) // 8 * (int(vector.group(1)) if vector else 1))
    if verb == "ld":
        for match in re.finditer(r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x\w+|\d+)", text):
            widest = max(widest, int(match.group(1), 0))
        if re.search(r"cp\.async\.bulk\.tensor\S*\.shared\S*\.global", text):
            widest = max(widest, 128)
    elif re.search(r"cp\.async\.bulk\.tensor\S*\.global\S*\.shared", text):
        widest = max(widest, 128)
    return widest


def _width_amd(text: str, verb: str) -> int:
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2,
             "ubyte": 1, "byte": 1, "b128": 16, "b96": 12, "b64": 8, "b32": 4, "b16": 2, "b8": 1}
    found = re.findall(rf"(?:global|buffer)_{verb}_(dwordx\d|dword|u?short|u?byte|b\d+)", text)
    return max((sizes[f] for f in found), default=0)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    tool = CUDA_TOOLS / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as handle:
        handle.write(cubin)
        handle.flush()
        text = subprocess.run([tool, "-res-usage", handle.name], capture_output=True, text=True,
                              check=True).stdout
    registers = max(int(r) for r in re.findall(r"REG:(\d+)", text))
    # A Triton kernel has a stack frame only for what ptxas spilled.
    return registers, max(int(s) for s in re.findall(r"STACK:(\d+)", text))


def _occupancy(arch: str, registers: int, shared: int, warps: int) -> float | None:
    """Warps in flight over warps a multiprocessor holds, bounded by registers and memory."""
    if arch not in _LIMITS:
        return None
    all_registers, all_threads, all_shared = _LIMITS[arch]
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    blocks = min(all_registers // (per_warp * warps), all_threads // (32 * warps),
                 all_shared // (shared + 1024), 32)
    return round(blocks * warps / (all_threads // 32), 3)


def measure(arch: str, compiled: Any, num_warps: int) -> dict[str, Any]:
    """Registers, spills, shared memory, occupancy, MMA kind and count, access widths."""
    asm, shared = compiled.asm, int(compiled.metadata.shared)
    if "ptx" in asm:
        text = asm["ptx"]
        registers, spills = _cubin_usage(asm["cubin"])
        load, store = _width_ptx(text, "ld"), _width_ptx(text, "st")
        warps = int(re.search(r"\.reqntid\s+(\d+)", text).group(1)) // 32  # type: ignore[union-attr]
        occupancy = _occupancy(arch, registers, shared, warps)
    else:
        text = asm["amdgcn"]
        count = {key: int(value) for key, value in re.findall(
            r"\.(vgpr_count|agpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text)}
        registers = count.get("vgpr_count", 0)
        # Scalar spills go to vector lanes and cost no memory traffic.
        spills = 4 * count.get("vgpr_spill_count", 0)
        load, store = _width_amd(text, "load"), _width_amd(text, "store")
        # 512 registers a lane of each of four SIMDs, at most 8 waves on one; 64 KiB LDS.
        waves = min(8, 512 // max(8, -(-registers // 8) * 8))
        blocks = min(waves * 4 // num_warps, 65536 // max(shared, 1))
        occupancy = round(blocks * num_warps / 32, 3) if arch.startswith("gfx9") else None
    mma = Counter({kind: len(re.findall(pattern, text)) for kind, pattern in _MMA.items()})
    kinds = {kind: number for kind, number in mma.items() if number}
    return {
        "registers": registers, "spills": spills, "shared_bytes": shared, "occupancy": occupancy,
        "mma": next(iter(kinds), "none"), "mma_count": sum(kinds.values()),
        "max_load_bytes": load, "max_store_bytes": store,
    }


def _source_and_options(case: Case) -> tuple[Any, dict[str, Any]]:
    from triton.compiler import ASTSource

    source = ASTSource(case.kernel, case.signature(), dict(case.constants), case.attributes())
    return source, {"num_warps": case.num_warps, "num_stages": case.num_stages,
                    "enable_fp_fusion": True, **case.options}


def compiled_of(case: Case, arch: str) -> Any:
    """Triton's compiled kernel, with the text of every stage."""
    source, options = _source_and_options(case)
    return triton.compile(source, target=target_of(arch), options=options)


def compile_case(case: Case, arch: str, cache: Path | None) -> dict[str, Any]:
    """Compile and measure, or read the figures of the same source from the cache."""
    source, options = _source_and_options(case)
    # The figures depend on how this file reads them, too.
    reader = Path(__file__).read_text()
    text = f"{triton.__version__} {arch} {source.hash()} {sorted(options.items())} {reader}"
    entry = cache / (hashlib.sha256(text.encode()).hexdigest() + ".json") if cache else None
    if entry and entry.exists():
        return dict(json.loads(entry.read_text()), cached=True)
    started = time.perf_counter()
    result: dict[str, Any] = {"error": None}
    try:
        compiled = compiled_of(case, arch)
        result.update(measure(arch, compiled, case.num_warps))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        result["error"] = f"{type(error).__name__}: {' | '.join(lines[-3:])}"[:400]
    result["compile_s"] = round(time.perf_counter() - started, 2)
    if entry and result["error"] is None:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = entry.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(result))
        partial.replace(entry)
    return result
