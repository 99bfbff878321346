"""The choices that a shape decides: tiles for few rows and columns, and when descriptors move them."""

import pytest

from pyparallel.kernels.configurations import (
    ARCHITECTURES,
    DESCRIPTOR_ROWS,
    FEW_ROWS,
    descriptor_config,
    descriptors_pay,
    gated_mlp_config,
    matmul_config,
    matmul_rows,
)


@pytest.mark.parametrize(
    ("m", "n", "k", "label"),
    [
        (1, 4096, 4096, "16x64x128 w4 s6 swap"),
        (16, 14336, 4096, "16x64x128 w4 s6 swap"),
        (32, 3584, 8192, "32x64x128 w4 s5 swap"),
        (64, 4096, 4096, "32x64x128 w4 s5 swap"),
        # Columns enough for the larger tiles.
        (64, 14336, 4096, "64x128x64 w4 s5"),
        (128, 4096, 4096, "128x32x128 w4 s5"),
        (128, 14336, 4096, "128x128x128 w8 s3"),
        (129, 4096, 4096, "128x128x64 w8 s4"),
        (4096, 14336, 4096, "128x128x64 w8 s4"),
    ],
)
def test_the_fastest_tiles_on_an_h100(m, n, k, label):
    assert matmul_config("sm_90", m, n, k, 2).label == label


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "interpreter"])
def test_many_rows_have_one_row_of_the_table(arch):
    """So that the bits of a shard do not depend on the pieces that it is multiplied in."""
    found = {matmul_config(arch, m, 4096, 4096, 2) for m in (FEW_ROWS + 1, 512, 4096, 100_000)}
    assert len(found) == 1
    shipped = {row for _, _, row in matmul_rows(arch)}
    for m in (1, 16, 17, 64, 65, 128, 129):
        for n in (1, 64, 4096, 14336, 128256):
            assert matmul_config(arch, m, n, 4096, 2) in shipped


@pytest.mark.parametrize(
    ("m", "n", "label"),
    [
        (256, 4096, "64x128x64 w4 s6"),
        (512, 4096, "128x128x64 w8 s6"),
        (512, 14336, "128x256x64 w8 s3"),
        (4096, 4096, "128x256x64 w8 s3"),
    ],
)
def test_descriptors_take_the_tile_of_least_rounds(m, n, label):
    assert descriptor_config("matmul", "sm_90", m, n, 2).label == label


def test_descriptors_need_rows_and_tiles():
    assert descriptors_pay("matmul", "sm_90", 4096, 4096, 2)
    assert not descriptors_pay("matmul", "sm_90", FEW_ROWS, 14336, 2)
    assert not descriptors_pay("matmul", "sm_90", 256, 128, 2)
    assert not descriptors_pay("gated_mlp", "sm_90", DESCRIPTOR_ROWS["gated_mlp"] - 1, 14336, 2)
    assert descriptors_pay("gated_mlp", "sm_90", 4096, 14336, 2)
    for arch in ("sm_80", "gfx942", "interpreter"):
        assert not descriptors_pay("matmul", arch, 4096, 4096, 2)


def test_few_rows_of_a_gated_mlp_are_not_padded():
    assert gated_mlp_config("sm_90", 16, 2).block_m == 16
    assert gated_mlp_config("sm_90", 17, 2).block_m == 64
