"""The CUDA extension on a machine without a GPU: it loads, its ops have schemas and fake kernels, its
machine code is what it should be. Built by `make cuda`; skipped, and said so, where it is not."""

from __future__ import annotations

import re
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyparallel import _C
from pyparallel.native.cuda import extension as cuda_extension

pytestmark = pytest.mark.skipif(
    not cuda_extension.is_built(), reason="the CUDA extension is not built: run `make cuda`"
)

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"


def declared(pattern: str, files: str) -> set[str]:
    """What the pattern finds in the sources of the extension."""
    return {name for path in CSRC.rglob(files) for name in re.findall(pattern, path.read_text())}


OPS = declared(r'm\.def\(\s*"(cuda_\w+)\(', "*.cpp")
# Kernels with a wide variant, which must move 16 bytes at a time, in and out: those that have a width,
# and those of peers that move packs.
WIDE_KERNELS = declared(r"template <int W[^>]*>\s*__global__[^;{]*?\b([a-z_]+_kernel)\(", "*.cu")
WIDE_KERNELS |= {
    "all_reduce_kernel",
    "reduce_scatter_kernel",
    "all_gather_kernel",
    "all_to_all_kernel",
    "broadcast_kernel",
}
# These only read wide: their results are a few statistics a row.
READING_KERNELS = {"cross_entropy_stats_kernel", "column_sum_partial_kernel"}
WIDE_KERNELS -= READING_KERNELS


@pytest.fixture(scope="module")
def extension():
    return cuda_extension.load()


def test_architectures(extension) -> None:
    assert extension.architectures().split() == ["sm_80", "sm_90a", "sm_100a"]


def test_what_is_missing_is_said(extension) -> None:
    facts = cuda_extension.describe()
    assert facts["built"] and re.fullmatch(r"2\.\d+\.\d+", facts["nccl"])
    if torch.version.cuda is None:
        assert "built without CUDA" in facts["missing"][0]
    if extension.device_count() == 0:
        assert "no CUDA device" in facts["missing"]


def test_nccl_without_a_device_is_a_clear_error(extension) -> None:
    if extension.device_count() > 0:
        pytest.skip("there is a device")
    with pytest.raises(RuntimeError, match="CUDA error"):
        extension.NcclCommunicator("g", b"\0" * 128, 0, 1, 1.0)
    with pytest.raises(RuntimeError, match="CUDA error"):
        extension.IpcSegments(4096)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("g", b"short", 0, 1, 1.0), "id: expected the 128 bytes"),
        (("g", b"\0" * 128, 2, 2, 1.0), "rank: expected 0 to size - 1, got 2 of 2"),
    ],
)
def test_bad_communicator_arguments(extension, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        extension.NcclCommunicator(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("g", 0, 1 << 20, 1.0, [0] * 17), "bases: expected 1 to 16 ranks, got 17"),
        (("g", 3, 1 << 20, 1.0, [0, 0]), "rank: expected 0 to 1, got 3"),
        (("g", 0, 1000, 1.0, [0, 0]), "slot_bytes: expected a multiple of 128"),
    ],
)
def test_bad_peer_group_arguments(extension, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        extension.PeerGroup(*arguments)


def test_segments_are_lines(extension) -> None:
    for size in (1, 2, 8, 16):
        small = extension.PeerGroup.segment_bytes(size, 1 << 16)
        large = extension.PeerGroup.segment_bytes(size, 1 << 17)
        assert small % 128 == 0 and large - small == 32 * 4 * (1 << 16)


def test_every_op_has_a_schema_and_a_fake_kernel(extension) -> None:
    from pyparallel.native.cuda import ops as cuda_ops
    from pyparallel.ops.cuda import softcap  # noqa: F401  (registers its ops' fakes)

    assert len(OPS) >= 14 and len(WIDE_KERNELS) >= 15
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("pyparallel::cuda_")}
    assert {n.removeprefix("pyparallel::") for n in names} == OPS
    ops = torch.ops.pyparallel
    m, h, v = 6, 16, 40
    with FakeTensorMode():
        x = torch.empty(m, h, dtype=torch.bfloat16, device="meta")
        row = torch.empty(h, dtype=torch.bfloat16, device="meta")
        stat = torch.empty(m, device="meta")
        targets = torch.empty(m, dtype=torch.int64, device="meta")
        logits = torch.empty(m, v, dtype=torch.bfloat16, device="meta")

        def shapes(*results) -> list:
            return [(tuple(t.shape), t.dtype) for t in results]

        like, line, stats = ((m, h), x.dtype), ((h,), x.dtype), ((m,), torch.float32)
        assert shapes(*ops.cuda_rms_norm(x, row, 1e-5)) == [like, stats]
        assert shapes(*ops.cuda_add_rms_norm(x, x, row, 1e-5)) == [like, like, stats]
        assert shapes(*ops.cuda_rms_norm_backward(x, x, row, stat)) == [like, line]
        assert shapes(*ops.cuda_layer_norm(x, row, None, 1e-5)) == [like, stats, stats]
        backward = ops.cuda_layer_norm_backward(x, x, row, stat, stat)
        assert shapes(*backward) == [like, line, line]
        code = cuda_ops.activation_code("silu")
        assert shapes(ops.cuda_bias_activation(x, row, code)) == [like]
        assert shapes(ops.cuda_bias_activation_backward(x, x, None, code)) == [like]
        assert shapes(ops.cuda_gated_activation(x, x, None, None, code)) == [like]
        both = ops.cuda_gated_activation_backward(x, x, x, None, None, code)
        assert shapes(both) == [((m, 2 * h), x.dtype)]
        one = ops.cuda_cross_entropy_stats(logits, targets, 0, -100)
        assert shapes(one) == [((m, 4), torch.float32)]
        rest = (targets, stat, stat, 0, v, -100, 0.1, 0.0)
        assert ops.cuda_cross_entropy_gradient_(logits, *rest) is None
        parts = torch.empty(4, m, h, dtype=torch.bfloat16, device="meta")
        assert ops.cuda_rank_sum(parts, None, None, x) is None
        assert shapes(ops.cuda_softcap(x, 30.0)) == [like]
        assert shapes(ops.cuda_softcap_backward(x, x, 30.0)) == [like]


def test_gradients_flow_through_the_registered_formulas(extension) -> None:
    from pyparallel.native.cuda import ops as cuda_ops
    from pyparallel.ops.cuda import softcap

    with FakeTensorMode():
        x = torch.empty(4, 8, device="meta", requires_grad=True)
        weight = torch.empty(8, device="meta", requires_grad=True)
        y, h = cuda_ops.add_rms_norm(x, x.detach(), weight, eps=1e-5)
        out = cuda_ops.layer_norm(y, weight, weight, eps=1e-5) + h
        out = cuda_ops.bias_activation(out, weight, activation="gelu")
        out = cuda_ops.gated_activation(out, out, activation="silu", gate_bias=weight)
        out = softcap.run(out, 30.0)
        cuda_ops.rms_norm(out, weight, eps=1e-5).sum().backward()
        assert x.grad.shape == (4, 8) and weight.grad.shape == (8,)


def test_activations_have_the_numbers_of_the_other_extension(extension) -> None:
    assert extension.ACTIVATIONS == _C.ACTIVATIONS


def test_unknown_activation() -> None:
    from pyparallel.native.cuda import ops as cuda_ops

    with pytest.raises(ValueError, match="activation: expected one of"):
        cuda_ops.activation_code("swish")


# Disassembling takes a while: one architecture in every run, the others in the sweep.
ARCHITECTURES = [
    "sm_90a",
    pytest.param("sm_80", marks=pytest.mark.slow),
    pytest.param("sm_100a", marks=pytest.mark.slow),
]


@lru_cache(maxsize=3)
def disassembly(architecture: str) -> dict[str, str]:
    """SASS of every kernel by its mangled name, by Triton's cuobjdump."""
    triton = pytest.importorskip("triton", reason="its package carries cuobjdump")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-sass", "-arch", architecture, str(cuda_extension.load().__file__)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    name, found = "", {}
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
            found[name] = ""
        elif name:
            found[name] += line + "\n"
    return found


def kernel_of(mangled: str) -> str:
    match = re.search(r"\d+([a-z][a-z_]*_kernel)", mangled)
    return match[1] if match else mangled


def is_wide(mangled: str) -> bool:
    """Template argument W of 4 or 8; kernels without W are always wide."""
    width = re.search(r"_kernelILi(\d+)E", mangled)
    return width is None or int(width[1]) > 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_moves_sixteen_bytes(architecture: str) -> None:
    load, store = re.compile(r"\bLDG?\.E\S*\.128"), re.compile(r"\bSTG?\.E\S*\.128")
    seen = set()
    for mangled, code in disassembly(architecture).items():
        kernel = kernel_of(mangled)
        if kernel not in WIDE_KERNELS | READING_KERNELS or not is_wide(mangled):
            continue
        seen.add(kernel)
        assert load.search(code), f"{mangled}: no 128-bit load"
        if kernel in WIDE_KERNELS:
            assert store.search(code), f"{mangled}: no 128-bit store"
    assert seen == WIDE_KERNELS | READING_KERNELS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_spills_nothing(architecture: str) -> None:
    local = re.compile(r"\b(LDL|STL)\b")
    spilling = [name for name, code in disassembly(architecture).items() if local.search(code)]
    assert spilling == []
