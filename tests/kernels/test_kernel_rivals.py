"""bench/kernels/kernel_rivals.py --tutorials, on stand-ins for Triton's tutorials: scripts that can't be
imported here, with kernels whose arguments are called as theirs are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUCK = 'raise SystemExit("this script wants a GPU")\n'
MATMUL = """
import triton
import triton.language as tl

DEVICE = triton.runtime.driver.active.get_active_torch_device()


@triton.jit
def twice(x):
    return x + x


@triton.autotune(configs=[], key=["M"])
@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr, ACTIVATION: tl.constexpr,
):
    m, n, k = tl.arange(0, BLOCK_SIZE_M), tl.arange(0, BLOCK_SIZE_N), tl.arange(0, BLOCK_SIZE_K)
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
    for start in range(0, K, BLOCK_SIZE_K):
        a = tl.load(a_ptr + m[:, None] * stride_am + (start + k)[None, :] * stride_ak)
        b = tl.load(b_ptr + (start + k)[:, None] * stride_bk + n[None, :] * stride_bn)
        acc = tl.dot(a, b, acc)
    place = c_ptr + m[:, None] * stride_cm + n[None, :] * stride_cn
    tl.store(place, twice(acc).to(tl.float16))


"""
ATTENTION = """
import triton
import triton.language as tl


@triton.jit
def _attn_fwd(
    sm_scale, M, Z, H, desc_q, desc_k, desc_v, desc_o, N_CTX, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FP8_OUTPUT: tl.constexpr, STAGE: tl.constexpr,
):
    q = desc_q.load([0, 0])
    k = desc_k.load([0, 0])
    p = tl.dot(q, k.T) * sm_scale
    tl.store(M + tl.arange(0, BLOCK_M), tl.max(p, 1))
    desc_o.store([0, 0], tl.dot(p.to(tl.float16), desc_v.load([0, 0])).to(tl.float16))


"""


def run(folder, cache, arch="sm_90"):
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(
        [
            *(sys.executable, "bench/kernels/kernel_rivals.py", "--json"),
            *("--arch", arch, "--tutorials", str(folder)),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture
def stand_in(tmp_path):
    (tmp_path / "03-matrix-multiplication.py").write_text(MATMUL + STUCK)
    (tmp_path / "06-fused-attention.py").write_text(ATTENTION + STUCK)
    return tmp_path


def test_tutorials_are_compiled_beside_ours(stand_in):
    result = run(stand_in, stand_in)
    assert result.returncode == 0, result.stderr
    rows = {row["name"]: row for row in json.loads(result.stdout)["kernels"]}
    assert {"tutorial matmul", "matmul", "tutorial attention", "attention"} <= rows.keys()
    for name in ("tutorial matmul", "tutorial attention"):
        row = rows[name]
        assert row["error"] is None and row["mma"] == "wgmma" and row["registers"] > 0
    # Descriptors are moved by the copy engine, whose accesses count 128.
    assert rows["tutorial attention"]["max_load_bytes"] == 128


def test_an_argument_of_another_release_is_named(stand_in):
    changed = MATMUL.replace("M, N, K,", "M, N, K, surprise,")
    (stand_in / "03-matrix-multiplication.py").write_text(changed + STUCK)
    result = run(stand_in, stand_in)
    assert result.returncode == 1 and "got also ['surprise']" in result.stderr
