"""What the compiler makes of the kernels; compiled in processes of their own, without interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyparallel.cli import main
from pyparallel.commands import kernels as kernels_command
from pyparallel.kernels.configurations import ARCHITECTURES
from pyparallel.kernels.report import report
from pyparallel.kernels.report.architectures import configured_as, target_of
from pyparallel.kernels.report.cases import all_cases, kernel_modules
from pyparallel.kernels.report.compile_kernel import Case, _width_amd, _width_ptx
from pyparallel.kernels.report.dump import dump

GOOD = {
    "error": None,
    "spills": 0,
    "shared_bytes": 1024,
    "mma": "wgmma",
    "max_load_bytes": 16,
    "max_store_bytes": 16,
}


def case(**changes):
    return Case("a", "b", None, {}, {}, 4, **changes)


def test_every_kernel_file_has_cases():
    """A kernel that nobody compiles can't hide: each @triton.jit entry point is in the table."""
    found = {c.kernel.__name__ for c in all_cases("sm_90")}
    seen = set()
    for module in kernel_modules():
        for name in vars(module):
            if name.endswith("_kernel") and hasattr(getattr(module, name), "arg_names"):
                seen.add(name)
                assert name in found, f"{module.__name__}.{name} is in no compile case"
    assert seen == found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cases_are_distinct(arch):
    labels = [(c.name, c.variant) for c in all_cases(arch)]
    assert len(labels) == len(set(labels)) > 90


@pytest.mark.parametrize(
    ("arch", "changes", "wrong"),
    [
        ("sm_90", {}, []),
        ("sm_90", {"spills": 8}, ["spills 8 bytes"]),
        ("sm_100", {"spills": 8, "mma": "tcgen05"}, []),
        ("sm_90", {"mma": "mma.sync"}, ["mma.sync, not wgmma"]),
        ("sm_100", {}, ["wgmma, not tcgen05"]),
        ("sm_90", {"max_load_bytes": 4}, ["loads 4 bytes"]),
        ("sm_90", {"max_store_bytes": 8}, ["stores 8 bytes"]),
        ("gfx942", {"max_store_bytes": 8, "mma": "mfma"}, []),
        ("gfx942", {"max_store_bytes": 4, "mma": "mfma"}, ["stores 4 bytes"]),
        (
            "sm_80",
            {"shared_bytes": 200000, "mma": "mma.sync"},
            ["shared memory 200000 over 166912"],
        ),
        ("sm_90", {"error": "it broke"}, ["it broke"]),
    ],
)
def test_what_is_wrong(arch, changes, wrong):
    assert report.shortfalls(case(tensor_core=True), arch, GOOD | changes)[0] == wrong


def test_a_waiver_excuses_all_but_spills():
    result = GOOD | {"mma": "none", "max_load_bytes": 4, "spills": 8}
    wrong, excused = report.shortfalls(case(tensor_core=True, waiver="why"), "sm_90", result)
    assert wrong == ["spills 8 bytes"]
    assert excused == ["none, not wgmma: why", "loads 4 bytes: why"]


def test_widths_are_read_from_the_text():
    assert _width_ptx("ld.global.b16 x; ld.global.L1::evict_last.v2.b32 y;", "ld") == 8
    assert _width_ptx("cp.async.cg.shared.global [ %r + 0 ], [ %rd + 0 ], 0x10, %r;", "ld") == 16
    assert _width_ptx("@%p st.global.v4.b32 [ %rd4 + 0 ], { %r2 };", "st") == 16
    assert _width_ptx("ld.shared.v4.b32 x;", "ld") == 0
    assert _width_amd("global_load_dwordx4 v; buffer_store_dwordx2 v", "load") == 16
    assert _width_amd("global_load_dwordx4 v; buffer_store_dwordx2 v", "store") == 8
    assert _width_amd("global_store_b64 v; global_store_d16_hi_b16 v", "store") == 8


def test_unknown_architecture():
    with pytest.raises(ValueError, match="expected sm_80, sm_90, sm_100 or gfx942, got 'sm90'"):
        target_of("sm90")


def command(*arguments, cache):
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(
        [sys.executable, "-m", "pyparallel", "kernels", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def test_command_compiles_and_caches(tmp_path):
    arguments = ("--arch", "sm_90", "gfx942", "--kernel", "cross_entropy_backward", "--json")
    first = command(*arguments, cache=tmp_path)
    assert first.returncode == 0, first.stderr
    rows = json.loads(first.stdout)["kernels"]
    assert [(r["name"], r["arch"]) for r in rows] == [
        ("cross_entropy_backward", "sm_90"),
        ("cross_entropy_backward", "gfx942"),
    ]
    for row in rows:
        assert row["error"] is None and row["registers"] > 0 and row["max_load_bytes"] == 16
        assert "cached" not in row
    again = json.loads(command(*arguments, cache=tmp_path).stdout)["kernels"]
    assert [r.pop("cached") for r in again] == [True, True]
    assert again == rows


def test_compilers_run_nothing_of_the_current_folder_and_end_quietly(tmp_path, monkeypatch):
    place = tmp_path / "here"
    place.mkdir()
    for name in ("multiprocessing", "signal", "types"):
        (place / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(place)
    script = Path(sys.executable).with_name("pyparallel")
    done = subprocess.run(
        [script, "kernels", "--arch", "sm_90", "--kernel", "softcap", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
    assert not (tmp_path / "ran").exists()


def test_tables_are_plain_where_they_are_read_on(tmp_path):
    """No control character, no frame, a row a line; also of architectures that have no tiles here."""
    archs = ("sm_90", "gfx1100")
    done = command("--arch", *archs, "--kernel", "softcap", cache=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.isascii() and all(c.isprintable() or c == "\n" for c in done.stdout)
    blocks = [block.splitlines() for block in done.stdout.strip().split("\n\n")]
    assert [block[0] for block in blocks] == list(archs)
    for block in blocks:
        assert [line.split()[0] for line in block[1:]] == ["kernel", "softcap", "softcap_backward"]
        # Columns stand under their titles.
        assert block[1].index("configuration") == block[2].index("bf16")


@pytest.mark.parametrize(
    ("kind", "arch", "holds"),
    [
        ("sass", "sm_90", "EXIT"),
        pytest.param("ptx", "sm_120", ".target sm_120a", marks=pytest.mark.slow),
        pytest.param("ttgir", "gfx1201", '"hip:gfx1201"', marks=pytest.mark.slow),
        pytest.param("amdgcn", "gfx942", "s_endpgm", marks=pytest.mark.slow),
    ],
)
def test_dump_prints_a_stage_of_every_configuration(kind, arch, holds):
    ((what, text),) = dump(kind, "softcap", [arch])
    assert what == f"softcap [bf16] for {arch}" and holds in text


def test_tiles_of_relatives():
    own = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950")
    assert all(configured_as(arch) == arch for arch in own)
    relatives = {"sm_75": "sm_86", "sm_110": "sm_100", "gfx90a": "gfx942", "gfx1100": "gfx942"}
    assert {arch: configured_as(arch) for arch in relatives} == relatives
    # Shown, not judged.
    failed = GOOD | {"error": "it broke"}
    assert report.shortfalls(case(tensor_core=True), "sm_75", failed) == ([], ["it broke"])


def die(task):
    if task[1] == 1:
        os._exit(1)
    return *task[:2], {"error": None}


def test_a_compiler_that_ends_its_process_fails_its_own_task(monkeypatch):
    monkeypatch.setattr(report, "compile_task", die)
    tasks = [("sm_90", index, None) for index in range(2)]
    errors = {index: result["error"] for _, index, result in report._results(tasks, 1)}
    assert errors == {0: None, 1: "the compiler ended its process"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--arch sm_90 --kernel sofcap", "contains one of sofcap; did you mean softcap?"),
        (
            "--dump ptx sofcap",
            "--dump: expected a kernel's name, got 'sofcap'; did you mean softcap?",
        ),
        ("--dump ptx softcap --arch gfx942", "ttir, ttgir, llir, amdgcn for gfx942, got 'ptx'"),
        ("--dump ptx softcap --json", "--dump: expected no --json, --markdown or --kernel with it"),
        (
            "--arch sm90",
            "got 'sm90'; or another that this Triton compiles for; did you mean sm_90?",
        ),
        ("--arch gfx777", "got 'gfx777': unsupported target: 'gfx777'; did you mean gfx942?"),
    ],
)
def test_a_name_that_is_none_is_answered_with_the_nearest(arguments, told, capfd):
    assert main(["kernels", *arguments.split()]) == 2
    error = capfd.readouterr().err
    assert told in error and error.count("\n") == 1


def test_without_triton_a_line(monkeypatch, capsys):
    monkeypatch.setattr(kernels_command, "find_spec", lambda name: None)
    assert main(["kernels"]) == 2
    assert capsys.readouterr().err == (
        "pyparallel: error: kernels: expected Triton, which compiles them, but it is not installed; "
        "pip install 'pyparallel-kernels[triton]'\n"
    )


def test_command_says_what_is_wrong_with_its_arguments(tmp_path):
    for arguments, message in (
        (("--arch", "h100"), "got 'h100'"),
        (("--arch", "sm_90", "--kernel", "nothing"), "no kernel's name contains one of nothing"),
    ):
        result = command(*arguments, cache=tmp_path)
        assert result.returncode == 2 and message in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_every_kernel_compiles_for_sm_90_and_meets_its_lines():
    """In CI: no failure, no spill, wgmma, 128-bit accesses; figures of unchanged kernels cached."""
    rows = report.compile_all(["sm_90"], cache=report.cache_directory())
    wrong = [(row["name"], row["config"], row["wrong"]) for row in rows if row["wrong"]]
    assert len(rows) > 90 and not wrong
