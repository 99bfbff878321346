"""GPUs, links and clusters by name and by TOML."""

from __future__ import annotations

import pytest

from pyparallel.planner.hardware import cluster_of, gpu_of, link_of
from pyparallel.planner.names import shipped
from pyparallel.planner.strategy import Inference, Strategy, Training

NEEDED = (
    *("a100", "a100-40gb", "h100", "h100-pcie", "h200", "b200", "mi300x"),
    *("l40s", "a10g", "l4", "a6000", "rtx-3090", "rtx4090"),
)
TOML = """
[gpu]
arch = "mine"
memory_bytes = 1000
bandwidth = 1e9
bf16_flops = 1e12
gpus_per_node = 2
[intra]
alpha_s = 1e-6
bytes_per_s = 1e8
"""


@pytest.mark.parametrize("name", NEEDED)
def test_what_the_issue_names_is_there(name):
    gpu = gpu_of(name)
    assert gpu.best_flops("bf16") <= gpu.peak_flops("bf16") <= gpu.peak_flops("fp8")


def test_everything_shipped_can_be_a_cluster():
    for name in shipped("gpus"):
        assert shipped("gpus")[name]["source"]
        assert cluster_of(name, 16).link(16).bytes_per_s > 0
    for name in shipped("links"):
        assert shipped("links")[name]["source"]
        assert link_of(name).alpha_s > 0


def test_memory_is_what_the_driver_reports():
    assert gpu_of("H100").memory_bytes == 81559 * 2**20
    assert gpu_of("NVIDIA H100 80GB HBM3") == gpu_of("h100")


def test_a_cluster_takes_the_usual_links_or_named_ones():
    usual = cluster_of("h100", 16)
    assert (usual.intra.name, usual.inter.name, usual.nodes) == ("NVLink-4", "NDR", 2)
    assert usual.link(8) == usual.intra
    assert usual.link(9) == usual.inter
    assert cluster_of("h100", 16, inter="efa").inter.name == "EFA"
    assert cluster_of("h100", 4).gpus_per_node == 4


def test_a_file_of_ones_own(tmp_path):
    place = tmp_path / "lab.toml"
    place.write_text(TOML)
    cluster = cluster_of(str(place), 4)
    assert cluster.gpu.name == "lab"
    assert (cluster.gpus_per_node, cluster.intra.bytes_per_s) == (2, 1e8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("memory_bytes = -5", "memory_bytes: expected at least 1"),
        ("bandwidth = inf", "bandwidth: expected a finite number"),
        ("bandwidth = 0", "bandwidth: expected a number above 0"),
        ("colour = 'red'", "colour: expected one of name"),
        ("arch = 5", "arch: expected a str"),
        ("]", "expected TOML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, line, message):
    place = tmp_path / "lab.toml"
    name = line.partition(" ")[0]
    kept = [each for each in TOML.splitlines() if not each.startswith(name)]
    place.write_text("\n".join([*kept[:2], line, *kept[2:]]))
    with pytest.raises(ValueError, match=message):
        cluster_of(str(place), 4)


def test_a_file_that_lacks_something(tmp_path):
    place = tmp_path / "lab.toml"
    place.write_text(TOML.replace("[gpu]", "[cpu]"))
    with pytest.raises(ValueError, match=r"expected a table \[gpu\]"):
        gpu_of(place)
    place.write_text(TOML.replace("bandwidth", "#"))
    with pytest.raises(ValueError, match="bandwidth: expected a float, but it is not there"):
        gpu_of(place)
    with pytest.raises(ValueError, match="no such file"):
        gpu_of(tmp_path / "none.toml")


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="no gpu is called 'h1000'; did you mean H100"):
        gpu_of("h1000")
    with pytest.raises(ValueError, match="no link is called 'nvlink9'; did you mean NVLink"):
        link_of("nvlink9")


def test_numbers_of_a_request_are_bounded():
    with pytest.raises(ValueError, match="gpus: expected at most"):
        cluster_of("h100", 2**40)
    with pytest.raises(ValueError, match="tp: expected at least 1"):
        Strategy(tp=0)
    with pytest.raises(ValueError, match="recompute: expected one of none, attention, layers"):
        Strategy(recompute="some")
    with pytest.raises(ValueError, match="kv_dtype"):
        Inference(kv_dtype="int3")
    with pytest.raises(ValueError, match="global_batch: expected a multiple of dp 3"):
        Training(16, 128).micro_batches(Strategy(dp=3))
